#include "runtime/aclnn/attention_layout.h"

#include <map>

#include "runtime/aclnn/fused_support.h"

namespace aclnn::fused {
namespace {

constexpr int64_t kUnlimited = INT32_MAX;

}  // namespace

InputLayout input_layout(const Call& call, const std::string& name) {
  static const std::map<std::string, InputLayout> kLayouts = {
      {"BSH", {"BSH", "BSH"}},         {"BSND", {"BSND", "BSND"}},     {"BNSD", {"BNSD", "BNSD"}},
      {"TND", {"TND", "TND"}},         {"NTD", {"NTD", "NTD"}},        {"NSD", {"NSD", "NSD"}},
      {"BNSD_BSND", {"BNSD", "BSND"}}, {"BSH_BNSD", {"BSH", "BNSD"}},  {"BSND_BNSD", {"BSND", "BNSD"}},
      {"NTD_TND", {"NTD", "TND"}},     {"TND_NTD", {"TND", "NTD"}},    {"BSH_NBSD", {"BSH", "NBSD"}},
      {"BSND_NBSD", {"BSND", "NBSD"}}, {"BNSD_NBSD", {"BNSD", "NBSD"}}};
  const auto found = kLayouts.find(name);
  if (found == kLayouts.end()) {
    std::string known;
    for (const auto& [key, value] : kLayouts) known += (known.empty() ? "" : ", ") + key;
    call.refuse("inputLayout", "has to be one of " + known + ", not \"" + name + "\"");
  }
  return found->second;
}

Axes axes_of(const Call& call, const char* name, const Tensor& tensor, const std::string& layout,
             int64_t heads) {
  require_rank(call, name, tensor, static_cast<int64_t>(layout.size()), static_cast<int64_t>(layout.size()));
  Axes axes;
  for (size_t i = 0; i < layout.size(); ++i) {
    const int64_t size = tensor.shape[i];
    const int64_t stride = tensor.strides[i];
    switch (layout[i]) {
      case 'B':
        axes.batches = size;
        axes.batch_stride = stride;
        break;
      case 'S':
      case 'T':
        axes.tokens = size;
        axes.token_stride = stride;
        break;
      case 'N':
        axes.heads = size;
        axes.head_stride = stride;
        break;
      case 'H':
        if (heads <= 0 || size % heads != 0)
          call.refuse(name, "has a last dimension of " + std::to_string(size) + ", which " +
                                std::to_string(heads) + " heads do not divide");
        axes.heads = heads;
        axes.width = size / heads;
        axes.head_stride = axes.width;
        break;
      default:
        axes.width = size;
    }
  }
  if (tensor.numel() > 0 && tensor.size(-1) != 1 && tensor.stride(-1) != 1)
    call.refuse(name,
                "has to have contiguous rows, but its last stride is " + std::to_string(tensor.stride(-1)));
  return axes;
}

host_runtime::kernels::HeadRows rows_of(const Tensor& tensor, const Axes& axes) {
  host_runtime::kernels::HeadRows rows;
  rows.base = tensor.data();
  rows.width = rows.chunk = axes.width;
  rows.row_stride = axes.token_stride;
  rows.head_stride = axes.head_stride;
  return rows;
}

ScoreAxes score_axes(const Call& call, const char* name, const Tensor& tensor, const ScoreShape& shape,
                     bool rows_are_batches) {
  require_rank(call, name, tensor, 2, 4);
  const int64_t rank = tensor.dim();
  const auto stride_of = [&](int64_t dim, int64_t wanted, const char* what) -> int64_t {
    if (tensor.shape[dim] == wanted) return tensor.strides[dim];
    if (tensor.shape[dim] == 1) return 0;
    call.refuse(name, "has " + std::to_string(tensor.shape[dim]) + " in dimension " + std::to_string(dim) +
                          ", where " + std::to_string(wanted) + " " + what + " (or 1) are needed; it is " +
                          describe(tensor));
  };
  ScoreAxes axes;
  if (rank == 2 && rows_are_batches) {
    axes.batch_stride = stride_of(0, shape.batches, "batches");
  } else {
    if (tensor.shape[rank - 2] < shape.tokens)
      call.refuse(name, "has " + std::to_string(tensor.shape[rank - 2]) + " rows for " +
                            std::to_string(shape.tokens) + " query tokens; it is " + describe(tensor));
    axes.token_stride = tensor.strides[rank - 2];
    if (rank >= 3) axes.batch_stride = stride_of(0, shape.batches, "batches");
    if (rank == 4) axes.head_stride = stride_of(1, shape.heads, "heads");
  }
  if (tensor.shape[rank - 1] < shape.keys)
    call.refuse(name, "has " + std::to_string(tensor.shape[rank - 1]) + " columns for " +
                          std::to_string(shape.keys) +
                          " keys (with paged keys: blocks a request times the block size); it is " +
                          describe(tensor));
  if (tensor.strides[rank - 1] != 1) require_contiguous(call, name, tensor);
  return axes;
}

host_runtime::kernels::Band band_of(const Call& call, int64_t sparse_mode, int64_t pre_tokens,
                                    int64_t next_tokens, bool with_mask) {
  host_runtime::kernels::Band band;
  const int64_t before = std::min(pre_tokens, kUnlimited);
  const int64_t after = std::min(next_tokens, kUnlimited);
  switch (sparse_mode) {
    case 0:
      band = {with_mask && (before < kUnlimited || after < kUnlimited), false, before, after};
      break;
    case 1:
      break;
    case 2:
      band = {true, false, kUnlimited, 0};
      break;
    case 3:
      band = {true, true, kUnlimited, 0};
      break;
    case 4:
      band = {true, true, before, after};
      break;
    default:
      call.refuse("sparseMode", "has to be 0 to 4, not " + std::to_string(sparse_mode));
  }
  return band;
}

const uint8_t* compressed_mask_memory(const Call& call, const Tensor* mask, int64_t sparse_mode) {
  constexpr int64_t kSide = 2048;
  const std::string mode = std::to_string(sparse_mode);
  if (mask == nullptr)
    call.refuse("attenMask", "is needed for sparseMode " + mode +
                                 ": torch.triu(torch.ones(2048, 2048, dtype=torch.bool), diagonal=1)");
  bool fits = mask->dim() >= 2 && mask->dim() <= 4 && mask->size(-1) == kSide && mask->size(-2) == kSide;
  for (int64_t i = 0; fits && i < mask->dim() - 2; ++i) fits = mask->shape[i] == 1;
  if (!fits)
    call.refuse("attenMask",
                "of sparseMode " + mode +
                    " has to be the compressed mask [2048, 2048] (or with dimensions of 1 before), not " +
                    describe(*mask));
  require_contiguous(call, "attenMask", *mask);
  return mask->data<uint8_t>();
}

void require_mask_dtype(const Call& call, const Tensor& mask, bool allow_int8) {
  if (mask.dtype == c10::ScalarType::Bool || mask.dtype == c10::ScalarType::Byte ||
      (allow_int8 && mask.dtype == c10::ScalarType::Char))
    return;
  call.refuse("attenMask", std::string("has to be bool, ") + (allow_int8 ? "int8 or uint8" : "or uint8") +
                               " (nonzero: hidden), not " + dtype_name(mask.dtype));
}

}  // namespace aclnn::fused
