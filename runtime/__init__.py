"""CANN on the host CPU: the libraries (C++), and the loader that chooses which CANN a process uses."""
