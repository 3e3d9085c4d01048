// The part of a replay that grows with the number of a program's inputs: see graph_inputs.pyi for the
// interface.
//
// A model of a few hundred parameters has that many addresses to compare at each call. By torch's and
// torch_npu's Python bindings each of them takes longer than a node of the replay does.

#include <acl/acl_rt.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch_npu/csrc/core/npu/NPUFormat.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

const at::Tensor& tensor_at(const py::tuple& arguments, size_t position) {
  if (position >= arguments.size())
    throw py::index_error("there is no argument " + std::to_string(position) + ", there are " +
                          std::to_string(arguments.size()));
  PyObject* object = PyTuple_GET_ITEM(arguments.ptr(), position);
  if (!THPVariable_Check(object))
    throw py::type_error("argument " + std::to_string(position) + " is no tensor");
  return THPVariable_Unpack(object);
}

const at::Tensor& tensor_of(const py::handle& object) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("a buffer has to be a tensor");
  return THPVariable_Unpack(object.ptr());
}

// Whether elements lie as strides say. Formats such as FRACTAL_NZ have an order of their own.
bool is_strided(const at::Tensor& tensor) {
  switch (at_npu::native::get_npu_format(tensor)) {
    case ACL_FORMAT_ND:
    case ACL_FORMAT_NCHW:
    case ACL_FORMAT_NHWC:
    case ACL_FORMAT_NCDHW:
      return true;
    default:
      return false;
  }
}

struct Bound {
  size_t position;
  uintptr_t address;
};

// Where an argument is copied to.
struct Feed {
  size_t position;
  at::Tensor buffer;
  bool dense;  // one element a location and no gaps: then its bytes are those from its first to its last
               // element

  bool takes_bytes_of(const at::Tensor& source) const {
    return dense && source.device() == buffer.device() && source.dtype() == buffer.dtype() &&
           source.sizes() == buffer.sizes() && source.strides() == buffer.strides() && !source.is_conj() &&
           !source.is_neg() && is_strided(source);
  }
};

class GraphInputs {
 public:
  GraphInputs(const std::vector<std::pair<size_t, uintptr_t>>& bound,
              const std::vector<std::pair<size_t, py::object>>& feeds) {
    for (const auto& [position, address] : bound) bound_.push_back({position, address});
    for (const auto& [position, object] : feeds) {
      const at::Tensor& buffer = tensor_of(object);
      feeds_.push_back({position, buffer, buffer.is_non_overlapping_and_dense() && is_strided(buffer)});
    }
  }

  std::vector<size_t> moved(const py::tuple& arguments) const {
    std::vector<size_t> found;
    for (const auto& [position, address] : bound_) {
      const void* now = tensor_at(arguments, position).const_data_ptr();
      if (reinterpret_cast<uintptr_t>(now) != address) found.push_back(position);
    }
    return found;
  }

  std::vector<size_t> copy(const py::tuple& arguments) const {
    std::vector<size_t> left;
    aclrtStream stream = nullptr;
    for (const Feed& feed : feeds_) {
      const at::Tensor& source = tensor_at(arguments, feed.position);
      const void* from = source.const_data_ptr();
      if (from == feed.buffer.const_data_ptr()) continue;
      if (!feed.takes_bytes_of(source)) {
        left.push_back(feed.position);
        continue;
      }
      const size_t bytes = source.nbytes();
      if (bytes == 0) continue;
      py::gil_scoped_release unlocked;  // torch_npu's queue is emptied before, which may need Python
      if (stream == nullptr) stream = c10_npu::getCurrentNPUStream(source.device().index()).stream();
      const aclError error =
          aclrtMemcpyAsync(feed.buffer.data_ptr(), bytes, from, bytes, ACL_MEMCPY_DEVICE_TO_DEVICE, stream);
      TORCH_CHECK(error == ACL_SUCCESS, "copying argument ", feed.position, " (", bytes,
                  " bytes) for a captured graph failed: aclrtMemcpyAsync returned ", error);
    }
    return left;
  }

 private:
  std::vector<Bound> bound_;
  std::vector<Feed> feeds_;
};

}  // namespace

PYBIND11_MODULE(graph_inputs, module) {
  module.doc() = "The inputs of a captured graph: compared and copied at each replay.";
  py::class_<GraphInputs>(module, "GraphInputs")
      .def(py::init<const std::vector<std::pair<size_t, uintptr_t>>&,
                    const std::vector<std::pair<size_t, py::object>>&>(),
           py::arg("bound"), py::arg("feeds"))
      .def("moved", &GraphInputs::moved, py::arg("arguments"))
      .def("copy", &GraphInputs::copy, py::arg("arguments"));
}
