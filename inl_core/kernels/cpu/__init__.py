"""Operations in C++: library.py compiles and finds them, cache.py keeps them, calls.py and structures.py call them."""
