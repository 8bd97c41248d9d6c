// The row kernels around attention: norm, gate, rotate and cross entropy. A row is read into
// vectors of the arithmetic type, and a result is rounded once.
// next: nothing; fused.h says where the operands are

// ---- whole and partial vectors -----------------------------------------------------------------

template <class A> INLINE void store_as(A* p, Vec<A> x) { store<A>(p, x); }
template <class A> INLINE void store_as(bf16* p, Vec<A> x) {
    WordW bits = (WordW)x;
    WordW rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    WordW nan = bits >> 16 | 0x40;
    *reinterpret_cast<HalfW*>(p) = __builtin_convertvector(x == x ? rounded : nan, HalfW);
}
template <class A> INLINE void store_as(f16* p, Vec<A> x) {
#if defined(FASTATTN_AVX2) && VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, 0));
#elif defined(FASTATTN_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
    for (int i = 0; i < LANES<A>; i++) p[i] = from_float<f16>(x[i]);
#endif
}

// The next lanes of a row of which `left` values remain; lanes past them are `fill`.
template <class A, class T> INLINE Vec<A> take(const T* p, int left, A fill = 0) {
    if (left >= LANES<A>) return load_as<A>(p);
    Vec<A> x = splat(fill);
    for (int i = 0; i < left; i++) x[i] = to_float(p[i]);
    return x;
}
template <class A, class T> INLINE void put(T* p, Vec<A> x, int left) {
    if (left >= LANES<A>) return store_as<A>(p, x);
    for (int i = 0; i < left; i++) {
        if constexpr (sizeof(T) == sizeof(A))
            p[i] = x[i];
        else
            p[i] = from_float<T>(x[i]);
    }
}

// Calls f(i, left, k) for each vector of a row of n values: i is its first value, left as for take,
// and k counts 0 to 3 over and over, to choose one of four sums that do not wait for each other.
// All but i are constants where the row has whole vectors.
template <class A, class F> INLINE void over(int n, const F& f) {
    constexpr int L = LANES<A>;
    int i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        f(i, L, 0);
        f(i + L, L, 1);
        f(i + 2 * L, L, 2);
        f(i + 3 * L, L, 3);
    }
    for (; i + L <= n; i += L) f(i, L, 0);
    if (i < n) f(i, n - i, 1);
}
template <class A> struct Sums {
    Vec<A> part[4] = {};
    INLINE_MEMBER Vec<A>& operator[](int k) { return part[k]; }
    INLINE_MEMBER A total() const {
        return reduce_sum<A>((part[0] + part[1]) + (part[2] + part[3]));
    }
};

template <class T> INLINE T* row_of(const Rows& rows, int64_t r) {
    return rows.data == nullptr ? nullptr : reinterpret_cast<T*>(rows.data) + r * rows.stride;
}

INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

// ---- norm: y = (x - mean) * rstd * weight + bias -------------------------------------------------

template <class A, class T> static void norm_rows(const NormCall& c, int64_t begin, int64_t end) {
    const A* weight = static_cast<const A*>(c.weight);
    const A* bias = static_cast<const A*>(c.bias);
    const int n = c.dim;
    for (int64_t r = begin; r < end; r++) {
        const T* x = row_of<T>(c.x, r);
        Sums<A> sum;
        if (c.residual.data != nullptr) {
            const T* residual = row_of<T>(c.residual, r);
            T* summed = row_of<T>(c.summed, r);
            over<A>(n, [&](int i, int left, int) INLINE_LAMBDA {
                put<A>(summed + i, take<A>(x + i, left) + take<A>(residual + i, left), left);
            });
            x = summed;
        }
        A mean = 0;
        if (c.center) {
            over<A>(n, [&](int i, int left, int k)
                           INLINE_LAMBDA { sum[k] += take<A>(x + i, left); });
            mean = sum.total() / n;
            static_cast<A*>(c.mean)[r] = mean;
        }
        Sums<A> squares;
        over<A>(n, [&](int i, int left, int k) INLINE_LAMBDA {
            Vec<A> d = take<A>(x + i, left, mean) - mean;
            squares[k] += d * d;
        });
        const A rstd = 1 / root(squares.total() / n + static_cast<A>(c.eps));
        static_cast<A*>(c.rstd)[r] = rstd;
        T* y = row_of<T>(c.y, r);
        auto finish = [&](auto has_weight, auto has_bias) INLINE_LAMBDA {
            over<A>(n, [&](int i, int left, int) INLINE_LAMBDA {
                Vec<A> value = (take<A>(x + i, left) - mean) * rstd;
                if constexpr (has_weight.value) value *= take<A>(weight + i, left);
                if constexpr (has_bias.value) value += take<A>(bias + i, left);
                put<A>(y + i, value, left);
            });
        };
        if (bias != nullptr && weight != nullptr)
            finish(std::true_type{}, std::true_type{});
        else if (weight != nullptr)
            finish(std::true_type{}, std::false_type{});
        else if (bias != nullptr)
            finish(std::false_type{}, std::true_type{});
        else
            finish(std::false_type{}, std::false_type{});
    }
}

// With xhat = (x - mean) * rstd and g = dy * weight:
// dx = rstd * (g - xhat * avg(g * xhat) - avg(g)), the last term with center only.
template <class A, class T>
static void norm_rows_backward(const NormCall& c, int64_t begin, int64_t end, A* dweight,
                               A* dbias) {
    const A* weight = static_cast<const A*>(c.weight);
    const int n = c.dim;
    for (int64_t r = begin; r < end; r++) {
        const T* x = row_of<T>(c.x, r);
        const T* dy = row_of<T>(c.dy, r);
        const T* dsummed = row_of<T>(c.dsummed, r);
        const A mean = c.center ? static_cast<const A*>(c.mean)[r] : 0;
        const A rstd = static_cast<const A*>(c.rstd)[r];
        Sums<A> along, sum;
        over<A>(n, [&](int i, int left, int k) INLINE_LAMBDA {
            Vec<A> xhat = (take<A>(x + i, left, mean) - mean) * rstd;
            Vec<A> d = take<A>(dy + i, left);
            if (dweight != nullptr)
                put<A>(dweight + i, take<A>(dweight + i, left) + d * xhat, left);
            if (dbias != nullptr) put<A>(dbias + i, take<A>(dbias + i, left) + d, left);
            if (weight != nullptr) d *= take<A>(weight + i, left);
            along[k] += d * xhat;
            sum[k] += d;
        });
        const A slope = along.total() / n;
        const A shift = c.center ? sum.total() / n : 0;
        T* dx = row_of<T>(c.dx, r);
        over<A>(n, [&](int i, int left, int) INLINE_LAMBDA {
            Vec<A> xhat = (take<A>(x + i, left) - mean) * rstd;
            Vec<A> d = take<A>(dy + i, left);
            if (weight != nullptr) d *= take<A>(weight + i, left);
            d = (d - xhat * slope - shift) * rstd;
            if (dsummed != nullptr) d += take<A>(dsummed + i, left);
            put<A>(dx + i, d, left);
        });
    }
}

template <class A> static void norm(const NormCall& c, int64_t begin, int64_t end) {
    with_type<A>(c.dtype, [&](auto* type) {
        norm_rows<A, std::remove_pointer_t<decltype(type)>>(c, begin, end);
    });
}
template <class A>
static void norm_backward(const NormCall& c, int64_t begin, int64_t end, void* dweight,
                          void* dbias) {
    with_type<A>(c.dtype, [&](auto* type) {
        norm_rows_backward<A, std::remove_pointer_t<decltype(type)>>(
            c, begin, end, static_cast<A*>(dweight), static_cast<A*>(dbias));
    });
}

// ---- gate: activation(gate) * up ---------------------------------------------------------------

// The normal distribution's cdf at -x, x >= 0, as exp(-x^2 / 2) * polynomial(1 / (1 + 0.4 x)):
// minimax, 8e-8 relative.
INLINE Vec<float> normal_tail(Vec<float> x, Vec<float> bell) {
    Vec<float> t = 1.0f / (1.0f + 0.4f * x);
    Vec<float> p = splat(-0.0396006107f);
    p = p * t + 0.2005997f;
    p = p * t - 0.373680562f;
    p = p * t + 0.250970721f;
    p = p * t - 0.0123841278f;
    p = p * t + 0.158415943f;
    p = p * t + 0.155786753f;
    p = p * t + 0.159904167f;
    return (p * t - 1.19867791e-5f) * bell;
}
INLINE Vec<double> normal_tail(Vec<double> x, Vec<double>) {
    for (int i = 0; i < LANES<double>; i++) x[i] = 0.5 * __builtin_erfc(x[i] * 0.7071067811865476);
    return x;
}

template <class A> struct Activated {
    Vec<A> value, slope;
};

template <class A> INLINE Activated<A> silu(Vec<A> x) {
    Vec<A> magnitude = x < A(0) ? -x : x;
    Vec<A> e = vexp2<A>(magnitude * A(-LOG2E));  // in (0, 1]: never overflows
    Vec<A> sigmoid = (x < A(0) ? e : splat(A(1))) / (A(1) + e);
    return {x * sigmoid, sigmoid * (A(1) + x * (A(1) - sigmoid))};
}

template <class A> INLINE Activated<A> gelu(Vec<A> x) {
    constexpr A INV_SQRT_2PI = A(0.3989422804014327);
    Vec<A> magnitude = x < A(0) ? -x : x;
    Vec<A> bell = vexp2<A>(x * x * A(-0.5 * LOG2E));
    Vec<A> tail = normal_tail(magnitude, bell);
    Vec<A> cdf = x < A(0) ? tail : A(1) - tail;
    Vec<A> bump = magnitude > A(40) ? Vec<A>{} : x * bell;  // inf * 0 is no NaN here
    return {x * cdf, cdf + bump * INV_SQRT_2PI};
}

template <class A> INLINE Activated<A> gelu_tanh(Vec<A> x) {
    constexpr A ROOT = A(0.7978845608028654), CUBE = A(0.044715);  // sqrt(2 / pi)
    Vec<A> t = vtanh(ROOT * (x + CUBE * x * x * x));
    Vec<A> inner = ROOT * (A(1) + 3 * CUBE * x * x);
    Vec<A> half = A(0.5) * (A(1) + t), sech = A(1) - t * t;
    Vec<A> bump = sech == A(0) ? Vec<A>{} : A(0.5) * x * sech * inner;
    return {x * half, half + bump};
}

// Calls f with the activation as a function of a vector.
template <class A, class F> INLINE void with_activation(Activation activation, F f) {
    switch (activation) {
        case Activation::SILU:
            return f([](Vec<A> x) INLINE_LAMBDA { return silu<A>(x); });
        case Activation::GELU:
            return f([](Vec<A> x) INLINE_LAMBDA { return gelu<A>(x); });
        default:
            return f([](Vec<A> x) INLINE_LAMBDA { return gelu_tanh<A>(x); });
    }
}

template <class A> static void gate(const GateCall& c, int64_t begin, int64_t end) {
    with_type<A>(c.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_activation<A>(c.activation, [&](auto activate) {
            for (int64_t r = begin; r < end; r++) {
                const T *g = row_of<T>(c.gate, r), *u = row_of<T>(c.up, r);
                T* out = row_of<T>(c.out, r);
                over<A>(c.dim, [&](int i, int left, int) INLINE_LAMBDA {
                    Vec<A> value = activate(take<A>(g + i, left)).value;
                    put<A>(out + i, value * take<A>(u + i, left), left);
                });
            }
        });
    });
}

template <class A> static void gate_backward(const GateCall& c, int64_t begin, int64_t end) {
    with_type<A>(c.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_activation<A>(c.activation, [&](auto activate) {
            for (int64_t r = begin; r < end; r++) {
                const T *g = row_of<T>(c.gate, r), *u = row_of<T>(c.up, r);
                const T* dout = row_of<T>(c.dout, r);
                T *dgate = row_of<T>(c.dgate, r), *dup = row_of<T>(c.dup, r);
                over<A>(c.dim, [&](int i, int left, int) INLINE_LAMBDA {
                    Activated<A> a = activate(take<A>(g + i, left));
                    Vec<A> d = take<A>(dout + i, left);
                    put<A>(dgate + i, d * a.slope * take<A>(u + i, left), left);
                    put<A>(dup + i, d * a.value, left);
                });
            }
        });
    });
}

// ---- rotate: (a, b) becomes (a cos - b sin, a sin + b cos) -----------------------------------------

template <class A, class T>
INLINE void rotate_halves(const T* x, T* out, const A* cos, const A* sin, A sign, int pairs) {
    over<A>(pairs, [&](int i, int left, int) INLINE_LAMBDA {
        Vec<A> a = take<A>(x + i, left), b = take<A>(x + pairs + i, left);
        Vec<A> c = take<A>(cos + i, left), s = take<A>(sin + i, left) * sign;
        put<A>(out + i, a * c - b * s, left);
        put<A>(out + pairs + i, a * s + b * c, left);
    });
}

template <class A, class T>
INLINE void rotate_neighbours(const T* x, T* out, const A* cos, const A* sin, A sign, int pairs) {
    constexpr int L = LANES<A>;
    VecI<A> swap, low, high;
    Vec<A> signs;
    for (int i = 0; i < L; i++) {
        swap[i] = i ^ 1;
        low[i] = i / 2;
        high[i] = L / 2 + i / 2;
        signs[i] = i % 2 ? sign : -sign;
    }
    int i = 0;
    for (; i + L <= pairs; i += L) {  // two vectors of channels by one of angles
        Vec<A> c = load<A>(cos + i), s = load<A>(sin + i);
        Vec<A> x0 = load_as<A>(x + 2 * i), x1 = load_as<A>(x + 2 * i + L);
        Vec<A> y0 = x0 * __builtin_shuffle(c, low) +
                    __builtin_shuffle(x0, swap) * __builtin_shuffle(s, low) * signs;
        Vec<A> y1 = x1 * __builtin_shuffle(c, high) +
                    __builtin_shuffle(x1, swap) * __builtin_shuffle(s, high) * signs;
        store_as<A>(out + 2 * i, y0);
        store_as<A>(out + 2 * i + L, y1);
    }
    for (; i < pairs; i++) {
        A a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]), s = sin[i] * sign;
        Vec<A> turned = {a * cos[i] - b * s, a * s + b * cos[i]};
        put<A>(out + 2 * i, turned, 2);
    }
}

template <class A> static void rotate(const RotateCall& c, int64_t begin, int64_t end) {
    const int64_t inside = c.heads_inside ? c.heads : c.length;
    const int64_t outside = c.heads_inside ? c.length : c.heads;
    const A sign = c.inverse ? -1 : 1;
    with_type<A>(c.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int64_t r = begin; r < end; r++) {
            const int64_t b = r / (inside * outside), second = r / inside % outside;
            const int64_t h = c.heads_inside ? r % inside : second;
            const int64_t s = c.heads_inside ? second : r % inside;
            const T* x = reinterpret_cast<const T*>(c.x) + b * c.x_stride[0] + h * c.x_stride[1] +
                         s * c.x_stride[2];
            T* out = reinterpret_cast<T*>(c.out) + b * c.out_stride[0] + h * c.out_stride[1] +
                     s * c.out_stride[2];
            const int64_t p =
                c.positions == nullptr ? s : c.positions[b * c.positions_batch + s];
            const A* cos = static_cast<const A*>(c.cos) + p * c.cos_stride;
            const A* sin = static_cast<const A*>(c.sin) + p * c.sin_stride;
            if (c.interleaved)
                rotate_neighbours<A>(x, out, cos, sin, sign, c.pairs);
            else
                rotate_halves<A>(x, out, cos, sin, sign, c.pairs);
            for (int i = 2 * c.pairs; i < c.dim; i++) out[i] = x[i];
        }
    });
}

// ---- cross entropy of one row of logits, and its gradient in their place ------------------------

template <class A, class T>
static void cross_entropy_rows(const CrossEntropyCall& c, int64_t begin, int64_t end) {
    constexpr int L = LANES<A>;
    const int n = c.vocab;
    const A cap = static_cast<A>(c.softcap), smoothing = static_cast<A>(c.label_smoothing);
    // The logit as the loss sees it; `t` is tanh, for the derivative.
    auto capped = [&](Vec<A> x, Vec<A>& t) INLINE_LAMBDA {
        if (cap == 0) return x;
        t = vtanh(x / cap);
        return cap * t;
    };
    for (int64_t r = begin; r < end; r++) {
        T* logits = row_of<T>(c.logits, r);
        const int64_t label = c.labels[r];
        Vec<A> t = {}, top[4];
        for (Vec<A>& x : top) x = splat<A>(NEG_INF);
        over<A>(n, [&](int i, int left, int k) INLINE_LAMBDA {
            top[k] = vmax<A>(capped(take<A>(logits + i, left, A(NEG_INF)), t), top[k]);
        });
        top[0] = vmax<A>(vmax<A>(top[0], top[1]), vmax<A>(top[2], top[3]));
        A row_max = NEG_INF;
        for (int i = 0; i < L; i++) row_max = top[0][i] > row_max ? top[0][i] : row_max;
        Sums<A> total, plain;
        over<A>(n, [&](int i, int left, int k) INLINE_LAMBDA {
            Vec<A> x = capped(take<A>(logits + i, left), t);
            plain[k] += x;
            for (int j = left; j < L; j++) x[j] = NEG_INF;
            total[k] += vexp2<A>((x - row_max) * A(LOG2E));
        });
        const A lse = row_max + A(__builtin_log(double(total.total())));
        static_cast<A*>(c.lse)[r] = lse;
        const bool kept = label != c.ignore_index;
        A loss = 0;
        if (kept) {
            const A target = capped(splat<A>(to_float(logits[label])), t)[0];
            loss = lse - (1 - smoothing) * target + static_cast<A>(c.z_loss) * lse * lse;
            if (smoothing != 0) loss -= smoothing * (plain.total() / n);
        }
        static_cast<A*>(c.loss)[r] = loss;
        if (c.scale == nullptr) continue;
        // d loss / d logit = softmax * (1 + 2 z lse) - smoothing / V, less 1 - smoothing at label
        const A scale = kept ? static_cast<const A*>(c.scale)[r] : 0;
        const A weight = scale * (1 + 2 * static_cast<A>(c.z_loss) * lse);
        const A uniform = scale * smoothing / n, at_label = scale * (1 - smoothing);
        A label_slope = 0;
        if (kept) {
            Vec<A> x = capped(splat<A>(to_float(logits[label])), t);
            A slope = weight * vexp2<A>((x - lse) * A(LOG2E))[0] - uniform - at_label;
            label_slope = cap == 0 ? slope : slope * (1 - t[0] * t[0]);
        }
        over<A>(n, [&](int i, int left, int) INLINE_LAMBDA {
            Vec<A> d = {};
            if (kept) {
                Vec<A> x = capped(take<A>(logits + i, left), t);
                d = weight * vexp2<A>((x - lse) * A(LOG2E)) - uniform;
                if (cap != 0) d *= A(1) - t * t;
            }
            put<A>(logits + i, d, left);
        });
        if (kept) put<A>(logits + label, splat<A>(label_slope), 1);
    }
}

template <class A>
static void cross_entropy(const CrossEntropyCall& c, int64_t begin, int64_t end) {
    with_type<A>(c.dtype, [&](auto* type) {
        cross_entropy_rows<A, std::remove_pointer_t<decltype(type)>>(c, begin, end);
    });
}

template <class A>
constexpr FusedKernels FUSED = {norm<A>,          norm_backward<A>, gate<A>,
                                gate_backward<A>, rotate<A>,        cross_entropy<A>};
