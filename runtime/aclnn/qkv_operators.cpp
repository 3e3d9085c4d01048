// aclnnQkvRmsNormRopeCache: constraints as in ops-transformer posembedding/qkv_rms_norm_rope_cache.
#include "runtime/aclnn/attention_operators.h"
#include "runtime/aclnn/fused_support.h"
#include "runtime/kernels/qkv_cache.h"

namespace aclnn::fused {
namespace {

constexpr int64_t kHead = 128;
static_assert(kHead <= kernels::kMaxQkvWidth);

std::string text(int64_t value) { return std::to_string(value); }

struct Sizes {
  int64_t batch, length, query_heads, key_heads;
  int64_t tokens() const { return batch * length; }
};

Sizes sizes_of(const Call& call, const QkvRmsNormRopeCache& a) {
  if (a.qkv_size.size() != 4)
    call.refuse("qkvSize", "has to be [batch, length, heads, head size], not " + describe(a.qkv_size));
  if (a.head_nums.size() != 3)
    call.refuse("headNums", "has to be the heads of query, key and value, not " + describe(a.head_nums));
  if (a.qkv_size[3] != kHead)
    call.refuse("qkvSize",
                "has head size " + text(a.qkv_size[3]) +
                    ", but the operator takes 128 only; split, normalise and rotate other sizes with "
                    "npu_rms_norm, npu_rotary_mul and npu_scatter_pa_kv_cache");
  const int64_t heads = a.head_nums[0] + a.head_nums[1] + a.head_nums[2];
  if (a.head_nums[0] <= 0 || a.head_nums[1] <= 0 || a.head_nums[1] != a.head_nums[2] ||
      heads != a.qkv_size[2])
    call.refuse("headNums", describe(a.head_nums) +
                                " has to be positive, with as many key as value heads, and add up to the " +
                                text(a.qkv_size[2]) + " heads of qkvSize");
  const Sizes sizes{a.qkv_size[0], a.qkv_size[1], a.head_nums[0], a.head_nums[1]};
  require_shape(call, "qkv", *a.qkv, {sizes.tokens(), heads * kHead});
  return sizes;
}

void check_inputs(const Call& call, const QkvRmsNormRopeCache& a, const Sizes& sizes) {
  const c10::ScalarType dtype = a.qkv->dtype;
  if (dtype != c10::ScalarType::Half && dtype != c10::ScalarType::BFloat16)
    call.refuse("qkv", "has to be float16 or bfloat16, not " + dtype_name(dtype));
  const auto check = [&](const char* name, const Tensor& tensor, c10::ArrayRef<int64_t> shape) {
    require_same_dtype(call, name, tensor, "qkv", *a.qkv);
    require_shape(call, name, tensor, shape);
  };
  check("qGamma", *a.query_gamma, {kHead});
  check("kGamma", *a.key_gamma, {kHead});
  check("cos", *a.cos, {sizes.tokens(), kHead});
  check("sin", *a.sin, {sizes.tokens(), kHead});
  check("qOut", *a.query_out, {sizes.tokens(), sizes.query_heads * kHead});
  require_contiguous(call, "qOut", *a.query_out);
  require_dtype(call, "index", *a.index, c10::ScalarType::Long);
  require_shape(call, "index", *a.index, {sizes.tokens()});
  require_contiguous(call, "index", *a.index);
  if (a.cache_mode != "PA_NZ") call.refuse("cacheMode", "has to be PA_NZ, not \"" + a.cache_mode + "\"");
}

struct CacheArguments {
  const char* name;
  const Tensor* cache;
  const char* scale_name;
  const Tensor* scale;
  const char* offset_name;
  const Tensor* offset;
  const char* rows_name;
  const Tensor* rows;
};

kernels::QkvCacheOutput output_of(const Call& call, const CacheArguments& o, const Tensor& qkv,
                                  const Sizes& sizes) {
  kernels::QkvCacheOutput output;
  output.cache = paged_cache(call, o.name, *o.cache, true);
  if ((o.cache->dtype == c10::ScalarType::Char) != (o.scale != nullptr))
    call.refuse(o.scale_name, std::string("is needed for an int8 ") + o.name +
                                  ", and for no other; the cache is " + dtype_name(o.cache->dtype));
  if (o.scale == nullptr) {
    require_same_dtype(call, o.name, *o.cache, "qkv", qkv);
    if (o.offset != nullptr) call.refuse(o.offset_name, std::string("needs ") + o.scale_name);
  }
  for (const auto& [name, tensor] : {std::pair{o.scale_name, o.scale}, {o.offset_name, o.offset}}) {
    if (tensor == nullptr) continue;
    require_dtype(call, name, *tensor, c10::ScalarType::Float);
    require_shape(call, name, *tensor, {sizes.key_heads, kHead});
    require_contiguous(call, name, *tensor);
  }
  if (o.scale != nullptr) output.scale = o.scale->data<float>();
  if (o.offset != nullptr) output.offset = o.offset->data<float>();
  const auto item = static_cast<int64_t>(o.cache->itemsize());
  if (output.cache.row_bytes() != sizes.key_heads * kHead * item)
    call.refuse(o.name, "has to be [blocks, " + text(sizes.key_heads * kHead * item / 32) + ", block size, " +
                            text(32 / item) + "] for " + text(sizes.key_heads) + " heads, not " +
                            describe(*o.cache));
  if (output.cache.block_size % (32 / item) != 0)
    call.refuse(o.name, "has blocks of " + text(output.cache.block_size) +
                            " rows, which have to be a multiple of " + text(32 / item));
  if (o.rows != nullptr) {
    require_same_dtype(call, o.rows_name, *o.rows, "qkv", qkv);
    require_shape(call, o.rows_name, *o.rows, {sizes.tokens(), sizes.key_heads * kHead});
    require_contiguous(call, o.rows_name, *o.rows);
    output.rows = o.rows->data();
  }
  return output;
}

void check_caches(const Call& call, const kernels::PagedCache& key, const kernels::PagedCache& value,
                  const Sizes& sizes) {
  if (key.blocks != value.blocks || key.block_size != value.block_size)
    call.refuse("vCache", "has " + text(value.blocks) + " blocks of " + text(value.block_size) +
                              " rows, kCache " + text(key.blocks) + " of " + text(key.block_size));
  if (key.block_size == 0) call.refuse("kCache", "has blocks of no rows");
  if (key.pieces != value.pieces && key.block_size % 32 != 0)
    call.refuse("kCache", "and vCache of different dtypes need a block size that is a multiple of 32, not " +
                              text(key.block_size));
  const int64_t needed = (sizes.length + key.block_size - 1) / key.block_size * sizes.batch;
  if (key.blocks < needed)
    call.refuse("kCache", "has " + text(key.blocks) + " blocks, but " + text(sizes.batch) + " requests of " +
                              text(sizes.length) + " tokens (qkvSize) need " + text(needed) +
                              "; pass packed tokens as one request");
}

}  // namespace

Work qkv_rms_norm_rope_cache(const Call& call, const QkvRmsNormRopeCache& a) {
  const Sizes sizes = sizes_of(call, a);
  check_inputs(call, a, sizes);
  kernels::QkvCache kernel{};
  kernel.key = output_of(
      call,
      {"kCache", a.key_cache, "kScale", a.key_scale, "kOffset", a.key_offset, "kOutBeforeQuant", a.key_rows},
      *a.qkv, sizes);
  kernel.value = output_of(call,
                           {"vCache", a.value_cache, "vScale", a.value_scale, "vOffset", a.value_offset,
                            "vOutBeforeQuant", a.value_rows},
                           *a.qkv, sizes);
  check_caches(call, kernel.key.cache, kernel.value.cache, sizes);
  if (a.query_rows != nullptr) {
    require_same_dtype(call, "qOutBeforeQuant", *a.query_rows, "qkv", *a.qkv);
    require_shape(call, "qOutBeforeQuant", *a.query_rows, a.query_out->shape);
    require_contiguous(call, "qOutBeforeQuant", *a.query_rows);
    kernel.query_rows = a.query_rows->data();
  }
  Staging staging;
  const TensorRef qkv = staging.in(*a.qkv, 1);
  const TensorRef cos = staging.in(*a.cos, 1);
  const TensorRef sin = staging.in(*a.sin, 1);
  const TensorRef query_gamma = staging.in(*a.query_gamma, 1);
  const TensorRef key_gamma = staging.in(*a.key_gamma, 1);
  kernel.type = float_type(call, "qkv", *qkv);
  kernel.qkv = qkv->data();
  kernel.qkv_row_stride = qkv->stride(0);
  kernel.cos = cos->data();
  kernel.cos_row_stride = cos->stride(0);
  kernel.sin = sin->data();
  kernel.sin_row_stride = sin->stride(0);
  kernel.query_gamma = query_gamma->data();
  kernel.key_gamma = key_gamma->data();
  kernel.slots = a.index->data<int64_t>();
  kernel.query_out = a.query_out->data();
  kernel.tokens = sizes.tokens();
  kernel.query_heads = sizes.query_heads;
  kernel.key_heads = sizes.key_heads;
  kernel.width = kHead;
  kernel.epsilon = static_cast<float>(a.epsilon);
  return std::move(staging).around([kernel] { kernels::qkv_cache(kernel); });
}

}  // namespace aclnn::fused
