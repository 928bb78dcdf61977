// The Python module holds nothing: importing it runs the TORCH_LIBRARY registrations linked into it.
#include <torch/extension.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}
