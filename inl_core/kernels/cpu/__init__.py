"""Operations in C++: the sources; library.py compiles and finds them, cache.py keeps them, calls.py calls them."""
