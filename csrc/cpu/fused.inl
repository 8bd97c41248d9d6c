// The row kernels around attention: norm, rotate and cross entropy.
// next: nothing; fused.h says where the operands are

// --- norm: y = (x - mean) * rstd * weight + bias ------------------------------------------------

template <class A, class T> static void norm_rows(const NormCall& c, int64_t begin, int64_t end) {
    const A* weight = static_cast<const A*>(c.weight);
    const A* bias = static_cast<const A*>(c.bias);
    const RowDropout dropout(c.dropout_key);
    const int n = c.dim;
    for (int64_t r = begin; r < end; r++) {
        const T* x = row_of<T>(c.x, r);
        Sums<A> sum;
        if (c.residual.data != nullptr) {
            const T* residual = row_of<T>(c.residual, r);
            T* summed = row_of<T>(c.summed, r);
            if (c.dropout)
                over_dropped<A>(dropout, r, n, [&](int i, int left, Vec<A> z) INLINE_LAMBDA {
                    Vec<A> kept = take<A>(x + i, left) * z;
                    put<A>(summed + i, kept + take<A>(residual + i, left), left);
                });
            else
                over<A>(n, [&](int i, int left, int) INLINE_LAMBDA {
                    put<A>(summed + i, take<A>(x + i, left) + take<A>(residual + i, left), left);
                });
            x = summed;
        }
        A mean = 0;
        if (c.center) {
            over<A>(n,
                    [&](int i, int left, int k) INLINE_LAMBDA { sum[k] += take<A>(x + i, left); });
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
template <class A, class T> static void norm_rows_backward(const NormCall& c, int64_t begin,
                                                           int64_t end, A* dweight, A* dbias) {
    const A* weight = static_cast<const A*>(c.weight);
    const RowDropout dropout(c.dropout_key);
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
        auto gradient = [&](int i, int left) INLINE_LAMBDA {
            Vec<A> xhat = (take<A>(x + i, left) - mean) * rstd;
            Vec<A> d = take<A>(dy + i, left);
            if (weight != nullptr) d *= take<A>(weight + i, left);
            d = (d - xhat * slope - shift) * rstd;
            if (dsummed != nullptr) d += take<A>(dsummed + i, left);
            put<A>(dx + i, d, left);
            return d;
        };
        if (c.dropout) {
            T* dkept = row_of<T>(c.dkept, r);
            over_dropped<A>(dropout, r, n, [&](int i, int left, Vec<A> z) INLINE_LAMBDA {
                put<A>(dkept + i, gradient(i, left) * z, left);
            });
        } else {
            over<A>(n, [&](int i, int left, int) INLINE_LAMBDA { gradient(i, left); });
        }
    }
}

template <class A> static void norm(const NormCall& c, int64_t begin, int64_t end) {
    with_type<A>(c.dtype, [&](auto* type) {
        norm_rows<A, std::remove_pointer_t<decltype(type)>>(c, begin, end);
    });
}
template <class A> static void norm_backward(const NormCall& c, int64_t begin, int64_t end,
                                             void* dweight, void* dbias) {
    with_type<A>(c.dtype, [&](auto* type) {
        norm_rows_backward<A, std::remove_pointer_t<decltype(type)>>(
            c, begin, end, static_cast<A*>(dweight), static_cast<A*>(dbias));
    });
}

// --- rotate: (a, b) becomes (a cos - b sin, a sin + b cos) --------------------------------------

template <class A, class T>
INLINE void rotate_halves(const T* x, T* out, const A* cos, const A* sin, A sign, int pairs) {
    over<A>(pairs, [&](int i, int left, int) INLINE_LAMBDA {
        Vec<A> a = take<A>(x + i, left), b = take<A>(x + pairs + i, left);
        Vec<A> c = take<A>(cos + i, left), s = take<A>(sin + i, left) * sign;
        put<A>(out + i, a * c - b * s, left);
        put<A>(out + pairs + i, a * s + b * c, left);
    });
}

template <class V, int... LANE> INLINE V swap_pairs(V x, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(x, x, (LANE ^ 1)...);
}
template <int FIRST, class V, int... LANE>
INLINE V each_twice(V x, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(x, x, (FIRST + LANE / 2)...);
}

template <class A, class T>
INLINE void rotate_neighbours(const T* x, T* out, const A* cos, const A* sin, A sign, int pairs) {
    constexpr int L = SIMD_WIDTH<A>;
    constexpr auto lanes = std::make_integer_sequence<int, L>{};
    Vec<A> signs;
    for (int i = 0; i < L; i++) signs[i] = i % 2 ? sign : -sign;
    int i = 0;
    for (; i + L <= pairs; i += L) {  // two vectors of channels by one of angles
        Vec<A> c = load<A>(cos + i), s = load<A>(sin + i);
        Vec<A> x0 = load_as<A>(x + 2 * i), x1 = load_as<A>(x + 2 * i + L);
        Vec<A> y0 =
            x0 * each_twice<0>(c, lanes) + swap_pairs(x0, lanes) * each_twice<0>(s, lanes) * signs;
        Vec<A> y1 = x1 * each_twice<L / 2>(c, lanes) +
                    swap_pairs(x1, lanes) * each_twice<L / 2>(s, lanes) * signs;
        store_as<A>(out + 2 * i, y0);
        store_as<A>(out + 2 * i + L, y1);
    }
    for (; i < pairs; i++) {
        A a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]), s = sin[i] * sign;
        Vec<A> rotated = {a * cos[i] - b * s, a * s + b * cos[i]};
        put<A>(out + 2 * i, rotated, 2);
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
            const int64_t p = c.positions == nullptr ? s : c.positions[b * c.positions_batch + s];
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

// --- cross entropy of one row of logits, and its gradient in their place ------------------------

template <class A, class T>
static void cross_entropy_rows(const CrossEntropyCall& c, int64_t begin, int64_t end) {
    constexpr int L = SIMD_WIDTH<A>;
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
            Vec<A> x = capped(take<A>(logits + i, left), t) - row_max;
            Vec<A> e = vexp2<A>(x * A(LOG2E));
            for (int j = left; j < L; j++) x[j] = e[j] = 0;
            plain[k] += x;
            total[k] += e;
        });
        // Against the maximum, not lse: a small loss is no difference of large numbers.
        const A sum = total.total(), log_sum = A(__builtin_log(double(sum)));
        const A lse = row_max + log_sum;
        static_cast<A*>(c.lse)[r] = lse;
        const bool kept = label != c.ignore_index;
        Vec<A> target = {}, target_t = {};
        if (kept) target = capped(splat<A>(to_float(logits[label])), target_t) - row_max;
        const A z = static_cast<A>(c.z_loss);
        A loss = log_sum - (1 - smoothing) * target[0] + z * lse * lse;
        if (smoothing != 0) loss -= smoothing * (plain.total() / n);  // which may be -inf
        static_cast<A*>(c.loss)[r] = kept ? loss : 0;
        if (c.scale == nullptr) continue;
        // d loss / d logit = softmax * (1 + 2 z lse) - smoothing / V, less 1 - smoothing at label
        const A scale = kept ? static_cast<const A*>(c.scale)[r] : 0;
        const A weight = scale * (1 + 2 * z * lse) / sum, uniform = scale * smoothing / n;
        A at_label = weight * vexp2<A>(target * A(LOG2E))[0] - uniform - scale * (1 - smoothing);
        if (cap != 0) at_label *= 1 - target_t[0] * target_t[0];
        over<A>(n, [&](int i, int left, int) INLINE_LAMBDA {
            Vec<A> d = {};
            if (kept) {
                Vec<A> x = capped(take<A>(logits + i, left), t);
                d = weight * vexp2<A>((x - row_max) * A(LOG2E)) - uniform;
                if (cap != 0) d *= A(1) - t * t;
            }
            put<A>(logits + i, d, left);
        });
        if (kept) put<A>(logits + label, splat<A>(at_label), 1);
    }
}

template <class A>
static void cross_entropy(const CrossEntropyCall& c, int64_t begin, int64_t end) {
    with_type<A>(c.dtype, [&](auto* type) {
        cross_entropy_rows<A, std::remove_pointer_t<decltype(type)>>(c, begin, end);
    });
}

template <class A> constexpr FusedKernels FUSED = {
    norm<A>,        norm_backward<A>,     gate<A>,   gate_backward<A>,
    activate<A>,    activate_backward<A>, rotate<A>, cross_entropy<A>,
    weight_pack<A>, weight_product<A>,
};
