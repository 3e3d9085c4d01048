#include <algorithm>

#include "runtime/aclnn/fused_support.h"
#include "runtime/aclnn/norm_operators.h"
#include "runtime/kernels/rotary.h"

namespace aclnn::fused {
namespace {

constexpr int64_t kWidestHead = 894;  // "D < 896" and even
constexpr int64_t kFusedHead = 128;
constexpr int64_t kUnifiedBuffer = 192 * 1024;

std::string names(int64_t value) { return std::to_string(value); }

/// cos and sin: x's shape with size 1 in any but the last dimension.
void check_broadcast(const Call& call, const char* name, const Tensor& tensor, const Tensor& x) {
  require_same_dtype(call, name, tensor, "x", x);
  bool fits = tensor.dim() == x.dim();
  for (int64_t i = 0; fits && i < x.dim(); ++i)
    fits = tensor.shape[i] == x.shape[i] || (tensor.shape[i] == 1 && i + 1 < x.dim());
  if (!fits)
    call.refuse(name, "has to have x's shape " + describe(x) + ", or 1 in dimensions before the last, not " +
                          describe(tensor));
}

/// A rotation of `x` into `out` (the same tensor for the in-place operators).
kernels::Rotary rotary_of(const Call& call, const Tensor& x, const Tensor& cos, const Tensor& sin,
                          const Tensor& out) {
  check_broadcast(call, "cos", cos, x);
  check_broadcast(call, "sin", sin, x);
  require_same_dtype(call, "out", out, "x", x);
  require_shape(call, "out", out, x.shape);
  const int64_t width = x.size(-1);
  if (width % 2 != 0 || width > kWidestHead)
    call.refuse("x", "has to have an even last dimension below 896, not " + describe(x));
  kernels::Rotary rotary{};
  rotary.type = float_type(call, "x", x);
  rotary.x = x.data();
  rotary.cos = cos.data();
  rotary.sin = sin.data();
  rotary.y = out.data();
  rotary.x_rows = outer_rows(x, 1);
  rotary.cos_rows = broadcast_rows(cos, x);
  rotary.sin_rows = broadcast_rows(sin, x);
  rotary.y_rows = outer_rows(out, 1);
  rotary.width = width;
  rotary.rows = width == 0 ? 0 : x.numel() / width;
  return rotary;
}

void check_rotary_layout(const Call& call, const Tensor& query, const Tensor& key, int64_t layout) {
  if (layout < 1 || layout > 4)
    call.refuse("layout", "has to be 1 (BSND), 2 (SBND), 3 (BNSD) or 4 (TND), not " + names(layout));
  const int64_t rank = layout == 4 ? 3 : 4;
  require_rank(call, "query", query, rank, rank);
  require_rank(call, "key", key, rank, rank);
  require_same_dtype(call, "key", key, "query", query);
  if (query.size(-1) != kFusedHead)
    call.refuse("query", "has to have a last dimension of 128, not " + describe(query) +
                             "; npu_rotary_mul takes other widths");
  // The kernel keeps one token's heads in the vector core's unified buffer; the formula is the document's.
  const int64_t heads =
      (layout == 3 ? query.size(1) + key.size(1) : query.size(-2) + key.size(-2)) * kFusedHead;
  const bool bfloat = query.dtype == c10::ScalarType::BFloat16;
  const auto item = static_cast<int64_t>(query.itemsize());
  const int64_t cast = bfloat ? 4 : item;
  const int64_t needed = heads * cast * 5 + kFusedHead * item * 4 + (bfloat ? kFusedHead * 8 : 0);
  if (needed > kUnifiedBuffer)
    call.refuse("query", "and key have too many heads for one call: the kernel would need " + names(needed) +
                             " bytes of the " + names(kUnifiedBuffer) +
                             "-byte unified buffer; use npu_rotary_mul");
}

}  // namespace

Work rotary_position_embedding(const Call& call, const Tensor& x, const Tensor& cos, const Tensor& sin,
                               int64_t mode, const Tensor& out) {
  require_rank(call, "x", x, 4, 4);
  if (mode != 0 && mode != 1)
    call.refuse("mode", "has to be 0 (half) or 1 (interleave) on this SoC, not " + names(mode));
  require_shape(call, "sin", sin, cos.shape);
  Staging staging;
  const TensorRef in = staging.in(x, 1);
  const TensorRef cosines = staging.in(cos, 1);
  const TensorRef sines = staging.in(sin, 1);
  const TensorRef result = staging.out(out, 1);
  kernels::Rotary rotary = rotary_of(call, *in, *cosines, *sines, *result);
  rotary.mode = mode == 0 ? kernels::RotaryMode::kHalf : kernels::RotaryMode::kInterleave;
  return std::move(staging).around([rotary] { kernels::rotary(rotary); });
}

Work apply_rotary_pos_emb(const Call& call, const Tensor& query, const Tensor& key, const Tensor& cos,
                          const Tensor& sin, int64_t layout, const std::string& mode) {
  check_rotary_layout(call, query, key, layout);
  kernels::RotaryMode rotation = kernels::RotaryMode::kHalf;
  if (mode == "quarter") {
    rotation = kernels::RotaryMode::kQuarter;
  } else if (mode == "interleave") {
    rotation = kernels::RotaryMode::kInterleave;
  } else if (mode != "half") {
    call.refuse("rotaryMode", "has to be half, quarter or interleave, not " + mode);
  }
  Staging staging;
  const TensorRef cosines = staging.in(cos, 1);
  const TensorRef sines = staging.in(sin, 1);
  const TensorRef queries = staging.in_out(query, 1);
  const TensorRef keys = staging.in_out(key, 1);
  kernels::Rotary rotate_query = rotary_of(call, *queries, *cosines, *sines, *queries);
  kernels::Rotary rotate_key = rotary_of(call, *keys, *cosines, *sines, *keys);
  rotate_query.mode = rotate_key.mode = rotation;
  return std::move(staging).around([rotate_query, rotate_key] {
    kernels::rotary(rotate_query);
    kernels::rotary(rotate_key);
  });
}

Work interleave_rope(const Call& call, const Tensor& x, const Tensor& cos, const Tensor& sin,
                     const Tensor& out) {
  require_rank(call, "x", x, 4, 4);
  if (x.size(-1) != 64) call.refuse("x", "has to have a last dimension of 64, not " + describe(x));
  if (cos.dim() != 4 || cos.size(1) != 1)
    call.refuse("cos", "has to be [B, 1, 1 or S, 64], not " + describe(cos));
  Staging staging;
  const TensorRef in = staging.in(x, 1);
  const TensorRef cosines = staging.in(cos, 1);
  const TensorRef sines = staging.in(sin, 1);
  const TensorRef result = staging.out(out, 1);
  kernels::Rotary rotary = rotary_of(call, *in, *cosines, *sines, *result);
  rotary.mode = kernels::RotaryMode::kInterleaveHalf;
  return std::move(staging).around([rotary] { kernels::rotary(rotary); });
}

namespace {

/// One of query and key.
kernels::CachedRotary cached_rotary_of(const Call& call, const CachedRope& a, const char* name,
                                       const Tensor& x, const Tensor& out) {
  require_rank(call, name, x, 2, 2);
  require_same_dtype(call, name, x, "cosSinCache", *a.cache);
  require_same_dtype(call, "out", out, name, x);
  require_shape(call, "out", out, x.shape);
  if (a.head_width <= 0 || x.size(1) % a.head_width != 0)
    call.refuse("headSize", "has to divide the " + names(x.size(1)) + " columns of " + name + ", but is " +
                                names(a.head_width));
  kernels::CachedRotary rotary{};
  rotary.type = float_type(call, name, x);
  rotary.half = a.half;
  rotary.positions = a.positions->data();
  rotary.positions_are_64bit = a.positions->dtype == c10::ScalarType::Long;
  rotary.cache = a.cache->data();
  rotary.cache_rows = a.cache->size(0);
  rotary.cache_row_stride = a.cache->stride(0);
  rotary.x = x.data();
  rotary.y = out.data();
  rotary.tokens = x.size(0);
  rotary.heads = x.size(1) / a.head_width;
  rotary.head_width = a.head_width;
  rotary.rotary_width = a.cache->size(1);
  rotary.x_token_stride = x.stride(0);
  rotary.y_token_stride = out.stride(0);
  return rotary;
}

void set_sections(const Call& call, const CachedRope& a, kernels::CachedRotary& rotary) {
  rotary.sections = a.positions->dim() == 1 ? 1 : a.positions->size(0);
  rotary.sections_interleaved = a.cache_mode == 1;
  if (rotary.sections == 1) return;
  const at::IntArrayRef sizes = a.sections.value_or(at::IntArrayRef());
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  if (rotary.sections > 4 || static_cast<int64_t>(sizes.size()) != rotary.sections ||
      total != rotary.rotary_width / 2)
    call.refuse("mropeSection",
                "has to have one size a row of positions (3 or 4), summing to half the rotary width " +
                    names(rotary.rotary_width / 2) + "; positions are " + describe(*a.positions));
  std::copy(sizes.begin(), sizes.end(), rotary.section_sizes);
}

}  // namespace

Work rope_with_sin_cos_cache(const Call& call, const CachedRope& a) {
  require_rank(call, "cosSinCache", *a.cache, 2, 2);
  require_rank(call, "positions", *a.positions, 1, 2);
  if (a.positions->dtype != c10::ScalarType::Long && a.positions->dtype != c10::ScalarType::Int)
    call.refuse("positions", "has to be int32 or int64, not " + dtype_name(a.positions->dtype));
  if (a.positions->size(-1) != a.query->size(0) || a.key->size(0) != a.query->size(0))
    call.refuse("positions", "has to have one position a token: query " + describe(*a.query) + ", key " +
                                 describe(*a.key) + ", positions " + describe(*a.positions));
  if (a.cache->size(1) % 2 != 0 || a.cache->size(1) > a.head_width)
    call.refuse("cosSinCache", "has to have an even width of at most headSize " + names(a.head_width) +
                                   ", not " + describe(*a.cache));
  require_contiguous(call, "positions", *a.positions);
  require_contiguous(call, "cosSinCache", *a.cache);
  Staging staging;
  const TensorRef query = staging.in(*a.query, 1);
  const TensorRef key = staging.in(*a.key, 1);
  const TensorRef query_out = staging.out(*a.query_out, 1);
  const TensorRef key_out = staging.out(*a.key_out, 1);
  kernels::CachedRotary rotate_query = cached_rotary_of(call, a, "query", *query, *query_out);
  kernels::CachedRotary rotate_key = cached_rotary_of(call, a, "key", *key, *key_out);
  set_sections(call, a, rotate_query);
  set_sections(call, a, rotate_key);
  return std::move(staging).around([rotate_query, rotate_key] {
    kernels::cached_rotary(rotate_query);
    kernels::cached_rotary(rotate_key);
  });
}

}  // namespace aclnn::fused
