"""Operations in C++ for a CPU, forward and backward: what they compute, and how their library is made."""
