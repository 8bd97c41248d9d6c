// The arguments of attention operators besides q, k and v, and how operators read arguments.
// The lists below have the names, types and order of fastattn's Python `Spec` and `Operands`, from
// which the operators' schemas are made; a test holds the two equal.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tensors.h"

namespace fastattn {

template <class Struct, class Value> struct Field {
    const char* name;
    Value Struct::* member;
};
template <class Struct, class Value> Field(const char*, Value Struct::*) -> Field<Struct, Value>;

// The numbers of a call.
struct Spec {
    double scale = 1, softcap = 0;
    int64_t left = -1, right = -1;
    bool align_end = true;
    double dropout_p = 0;

    static constexpr auto fields() {
        return std::tuple{
            Field{"scale", &Spec::scale},         Field{"softcap", &Spec::softcap},
            Field{"left", &Spec::left},           Field{"right", &Spec::right},
            Field{"align_end", &Spec::align_end}, Field{"dropout_p", &Spec::dropout_p}};
    }
};

// The optional tensors of a call. The comments in the Python class say what each one means.
struct Operands {
    OptionalTensor mask, bias, alibi_slopes, sinks, kv_lens, kv_starts, document_ids, key_begin,
        key_end, cu_seqlens_q, cu_seqlens_k, page_table, dropout_seed;

    static constexpr auto fields() {
        return std::tuple{Field{"mask", &Operands::mask},
                          Field{"bias", &Operands::bias},
                          Field{"alibi_slopes", &Operands::alibi_slopes},
                          Field{"sinks", &Operands::sinks},
                          Field{"kv_lens", &Operands::kv_lens},
                          Field{"kv_starts", &Operands::kv_starts},
                          Field{"document_ids", &Operands::document_ids},
                          Field{"key_begin", &Operands::key_begin},
                          Field{"key_end", &Operands::key_end},
                          Field{"cu_seqlens_q", &Operands::cu_seqlens_q},
                          Field{"cu_seqlens_k", &Operands::cu_seqlens_k},
                          Field{"page_table", &Operands::page_table},
                          Field{"dropout_seed", &Operands::dropout_seed}};
    }
};

// The tangents of forward mode, each absent where it is zero.
struct Tangents {
    OptionalTensor q, k, v, bias, sinks;

    static constexpr auto fields() {
        return std::tuple{Field{"tq", &Tangents::q}, Field{"tk", &Tangents::k},
                          Field{"tv", &Tangents::v}, Field{"tbias", &Tangents::bias},
                          Field{"tsinks", &Tangents::sinks}};
    }
};

// The arguments that all attention operators share, in the order of the schemas.
struct Inputs {
    Tensor q, k, v;
    Operands operands;
    Spec spec;
};

// --- reading the arguments ----------------------------------------------------------------------
// Torch calls an operator with a stack of 64-bit values. BOX(&function) is what it calls: it reads
// each parameter of `function` from the stack, where an Inputs, an Operands or a Spec reads all of
// its fields, runs `function`, and writes the tensors that it returns. TORCH_BOX does the same for
// functions that take each argument by itself.

template <class T, class = void> struct Reader {
    static constexpr size_t COUNT = 1;
    static T read(const StableIValue*& at) { return torch::stable::detail::to<T>(*at++); }
};

template <class T> struct Reader<T, std::void_t<decltype(T::fields())>> {
    static constexpr size_t COUNT = std::tuple_size_v<decltype(T::fields())>;
    static T read(const StableIValue*& at) {
        T value{};
        auto set = [&](auto field) {
            auto& member = value.*field.member;
            member = Reader<std::remove_reference_t<decltype(member)>>::read(at);
        };
        std::apply([&](auto... field) { (set(field), ...); }, T::fields());
        return value;
    }
};

template <> struct Reader<Inputs> {
    static constexpr size_t COUNT = 3 + Reader<Operands>::COUNT + Reader<Spec>::COUNT;
    static Inputs read(const StableIValue*& at) {  // braces evaluate from left to right
        return {Reader<Tensor>::read(at), Reader<Tensor>::read(at), Reader<Tensor>::read(at),
                Reader<Operands>::read(at), Reader<Spec>::read(at)};
    }
};

template <auto function> struct Boxed;

template <class... Results, class... Parameters, std::tuple<Results...> (*function)(Parameters...)>
struct Boxed<function> {
    static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
        constexpr size_t COUNT = (Reader<std::decay_t<Parameters>>::COUNT + ...);
        CHECK(arguments == COUNT && results == sizeof...(Results), "the schema has ", arguments,
              " arguments and ", results, " results, the kernel ", COUNT, " and ",
              sizeof...(Results));
        // Each read takes the reference that the stack holds. Nothing else may throw before all
        // are read, or the rest would never be freed.
        const StableIValue* at = stack;
        std::tuple<std::decay_t<Parameters>...> values{
            Reader<std::decay_t<Parameters>>::read(at)...};
        auto write = [&](const Results&... result) {
            ((*stack++ = torch::stable::detail::from(result)), ...);
        };
        std::apply(write, std::apply(function, std::move(values)));
    }
};

#define BOX(function) (&fastattn::Boxed<function>::call)

// The part of the schemas that Operands and Spec stand for: "Tensor? mask, ..., float dropout_p".
inline std::string schema_of_inputs() {
    std::string text;
    auto add = [&](const char* type, const char* name) {
        text += std::string(text.empty() ? "" : ", ") + type + " " + name;
    };
    auto add_all = [&](auto... field) {
        (add(std::is_same_v<decltype(field), Field<Operands, OptionalTensor>> ? "Tensor?"
             : std::is_same_v<decltype(field), Field<Spec, double>>           ? "float"
             : std::is_same_v<decltype(field), Field<Spec, int64_t>>          ? "int"
                                                                              : "bool",
             field.name),
         ...);
    };
    std::apply(add_all, Operands::fields());
    std::apply(add_all, Spec::fields());
    return text;
}

}  // namespace fastattn
