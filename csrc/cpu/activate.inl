// The row kernels with an activation: gate, and activate (bias, activation and dropout).
// next: fused.inl

// --- gate: activation(gate) * up ----------------------------------------------------------------

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
    for (int i = 0; i < SIMD_WIDTH<double>; i++)
        x[i] = 0.5 * __builtin_erfc(x[i] * 0.7071067811865476);
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

// --- activate: dropout(activation(x + bias)) ----------------------------------------------------

// activate()'s own activations besides the gate's; slope is of x.
template <class A, class F> INLINE void with_any_activation(Activation activation, F f) {
    if (activation == Activation::IDENTITY)
        return f([](Vec<A> x) INLINE_LAMBDA { return Activated<A>{x, splat(A(1))}; });
    if (activation == Activation::RELU)  // NaN stays
        return f([](Vec<A> x) INLINE_LAMBDA {
            return Activated<A>{x <= A(0) ? Vec<A>{} : x, x <= A(0) ? Vec<A>{} : splat(A(1))};
        });
    with_activation<A>(activation, f);
}

template <class A> static void activate(const ActivateCall& c, int64_t begin, int64_t end) {
    const A* bias = static_cast<const A*>(c.bias);
    const RowDropout dropout(c.dropout_key);
    with_type<A>(c.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_any_activation<A>(c.activation, [&](auto function) {
            for (int64_t r = begin; r < end; r++) {
                const T* x = row_of<T>(c.x, r);
                T* out = row_of<T>(c.out, r);
                auto value = [&](int i, int left) INLINE_LAMBDA {
                    Vec<A> at = take<A>(x + i, left);
                    if (bias != nullptr) at += take<A>(bias + i, left);
                    return function(at).value;
                };
                if (c.dropout)
                    over_dropped<A>(dropout, r, c.dim,
                                    [&](int i, int left, Vec<A> z) INLINE_LAMBDA {
                                        put<A>(out + i, value(i, left) * z, left);
                                    });
                else
                    over<A>(c.dim, [&](int i, int left, int)
                                       INLINE_LAMBDA { put<A>(out + i, value(i, left), left); });
            }
        });
    });
}

// From x; ReLU from its result after dropout, which is positive where it was kept.
template <class A>
static void activate_backward(const ActivateCall& c, int64_t begin, int64_t end, void* dbias) {
    const A* bias = static_cast<const A*>(c.bias);
    A* sums = static_cast<A*>(dbias);
    const RowDropout dropout(c.dropout_key);
    const bool relu = c.activation == Activation::RELU;
    const A scale = c.dropout ? A(1 / c.dropout_key.keep_probability()) : A(1);
    with_type<A>(c.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_any_activation<A>(c.activation, [&](auto function) {
            for (int64_t r = begin; r < end; r++) {
                const T *saved = row_of<T>(c.x, r), *dout = row_of<T>(c.dout, r);
                T* dx = row_of<T>(c.dx, r);
                auto step = [&](int i, int left, Vec<A> z) INLINE_LAMBDA {
                    Vec<A> d = take<A>(dout + i, left);
                    if (relu) {
                        d = take<A>(saved + i, left) <= A(0) ? Vec<A>{} : d * scale;
                    } else {
                        d *= z;
                        if (saved != nullptr) {
                            Vec<A> at = take<A>(saved + i, left);
                            if (bias != nullptr) at += take<A>(bias + i, left);
                            d *= function(at).slope;
                        }
                    }
                    put<A>(dx + i, d, left);
                    if (sums != nullptr) put<A>(sums + i, take<A>(sums + i, left) + d, left);
                };
                if (c.dropout && !relu)
                    over_dropped<A>(dropout, r, c.dim, step);
                else
                    over<A>(c.dim, [&](int i, int left, int)
                                       INLINE_LAMBDA { step(i, left, splat(A(1))); });
            }
        });
    });
}
