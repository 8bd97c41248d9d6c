// What the CPU library tells of this machine, as C strings: fastattn/backends/isa.py asks through
// ctypes, so that every build of the library answers, whatever else was built.
#include <stdexcept>
#include <string>

#include "isa.h"

using namespace fastattn::cpu;

#define EXPORT extern "C" __attribute__((visibility("default")))

// JSON: {"features": {name: bool}, "isas": [{"name", "automatic", "lacking": [feature]}]}, the
// instruction sets best first.
EXPORT const char* fastattn_cpu_facts() {
    static const std::string facts = [] {
        auto quoted = [](const std::string& name) { return "\"" + name + "\""; };
        auto list = [](const auto& rows, auto show) {
            std::string text;
            for (const auto& row : rows) text += (text.empty() ? "" : ", ") + show(row);
            return text;
        };
        auto feature = [&](const Feature& f) {
            return quoted(f.name) + (f.here ? ": true" : ": false");
        };
        auto isa = [&](const Isa& x) {
            return "{\"name\": " + quoted(x.name) +
                   ", \"automatic\": " + (x.automatic ? "true" : "false") + ", \"lacking\": [" +
                   list(x.lacking, quoted) + "]}";
        };
        return "{\"features\": {" + list(features(), feature) + "}, \"isas\": [" +
               list(isas(), isa) + "]}";
    }();
    return facts.c_str();
}

// The instruction set that a call made now would use; null where FASTATTN_ISA forbids every one.
EXPORT const char* fastattn_cpu_isa() try {
    return isas()[select_isa()].name;
} catch (const std::invalid_argument&) {
    return nullptr;
}

// Why there is none: empty where there is one. Valid until the thread asks again.
EXPORT const char* fastattn_cpu_isa_problem() {
    thread_local std::string problem;
    problem.clear();
    try {
        select_isa();
    } catch (const std::invalid_argument& error) {
        problem = error.what();
    }
    return problem.c_str();
}
