// What GCC's headers take from a glibc or a libstdc++ newer than manylinux_2_28's, made here: only
// a wheel has it, which is to load where those are older (setup.py). __libc_single_threaded is
// glibc 2.32's; false is always right, and makes shared_ptr count atomically. The others are of
// GCC 9 and 11.

#include <new>
#include <sstream>

extern "C" {
char __libc_single_threaded = 0;
}

namespace std {

void __throw_bad_array_new_length() { throw bad_array_new_length(); }

}  // namespace std

template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
