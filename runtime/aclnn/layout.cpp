#include "runtime/aclnn/layout.h"

#include <cstring>

#include "runtime/aclnn/operator.h"

namespace aclnn {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void unreadable(const Tensor& tensor, const std::string& why) {
  throw std::runtime_error("a tensor in format " + std::to_string(tensor.format) + " of view " +
                           describe(tensor.shape) + " and storage " + describe(tensor.storage_shape) + " " +
                           why + "; cast it with torch_npu.npu_format_cast(t, 2) first");
}

/// Calls `row(nd_row, fractal_row, bytes)` for each run of up to C0 elements of one row, first byte of each.
template <typename Visit>
void each_run(const NzView& v, size_t itemsize, char* packed, char* nd, const Visit& visit) {
  const int64_t c0 = v.fractal_columns, item = static_cast<int64_t>(itemsize);
  for (int64_t b = 0; b < v.batch; ++b) {
    for (int64_t nb = 0; nb < v.column_blocks; ++nb) {
      const int64_t width = std::min(c0, v.columns - nb * c0);
      for (int64_t m = 0; m < v.rows; ++m) {
        char* source = packed + (((b * v.column_blocks + nb) * v.row_blocks * kFractalRows + m) * c0) * item;
        visit(nd + ((b * v.rows + m) * v.columns + nb * c0) * item, source,
              static_cast<size_t>(width * item));
      }
    }
  }
}

}  // namespace

Dims nz_storage_shape(c10::ArrayRef<int64_t> shape, int64_t c0) {
  const size_t rank = shape.size();
  Dims result(shape.begin(), shape.end() - 2);
  result.push_back(ceil_div(shape[rank - 1], c0));
  result.push_back(ceil_div(shape[rank - 2], kFractalRows));
  result.push_back(kFractalRows);
  result.push_back(c0);
  return result;
}

NzView nz_view(const Tensor& tensor) {
  if (tensor.format != ACL_FORMAT_FRACTAL_NZ)
    unreadable(tensor, "is in a format that only FRACTAL_NZ kernels write");
  const int64_t rank = tensor.dim();
  const auto stored = static_cast<int64_t>(tensor.storage_shape.size());
  if (rank < 2 || stored < 4 || tensor.offset != 0) unreadable(tensor, "is not a whole matrix");
  NzView v{};
  v.transposed =
      tensor.stride(-1) != 1 || (tensor.stride(-2) == 1 && tensor.size(-1) == 1 && tensor.size(-2) != 1);
  v.rows = tensor.size(v.transposed ? -1 : -2);
  v.columns = tensor.size(v.transposed ? -2 : -1);
  v.column_blocks = tensor.storage_shape[stored - 4];
  v.row_blocks = tensor.storage_shape[stored - 3];
  v.fractal_columns = tensor.storage_shape[stored - 1];
  v.batch = 1;
  int64_t step = v.rows * v.columns;
  for (int64_t i = rank - 3; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != step) unreadable(tensor, "is a slice of packed storage");
    step *= tensor.shape[i];
    v.batch *= tensor.shape[i];
  }
  const int64_t row_step = tensor.stride(v.transposed ? -1 : -2),
                column_step = tensor.stride(v.transposed ? -2 : -1);
  if ((v.columns > 1 && column_step != 1) || (v.rows > 1 && row_step != v.columns) ||
      v.column_blocks != ceil_div(v.columns, v.fractal_columns) ||
      v.row_blocks != ceil_div(v.rows, kFractalRows)) {
    unreadable(tensor, "is a slice of packed storage");
  }
  return v;
}

at::Tensor unpack(const Tensor& tensor) {
  const NzView v = nz_view(tensor);
  Dims shape = tensor.shape;
  if (v.transposed) std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
  at::Tensor nd = at::empty(shape, at::TensorOptions().dtype(tensor.dtype));
  each_run(v, tensor.itemsize(), static_cast<char*>(tensor.storage), static_cast<char*>(nd.data_ptr()),
           [](char* row, char* fractal, size_t bytes) { std::memcpy(row, fractal, bytes); });
  return v.transposed ? nd.transpose(-1, -2) : nd;
}

void pack(const at::Tensor& values, const Tensor& tensor) {
  const NzView v = nz_view(tensor);
  const at::Tensor nd = (v.transposed ? values.transpose(-1, -2) : values).contiguous();
  const int64_t count = v.batch * v.column_blocks * v.row_blocks * kFractalRows * v.fractal_columns;
  std::memset(tensor.storage, 0, static_cast<size_t>(count) * tensor.itemsize());
  each_run(v, tensor.itemsize(), static_cast<char*>(tensor.storage), static_cast<char*>(nd.data_ptr()),
           [](char* row, char* fractal, size_t bytes) { std::memcpy(fractal, row, bytes); });
}

}  // namespace aclnn
