#include "runtime/aclnn/attention_operators.h"
#include "runtime/aclnn/fused_support.h"
#include "runtime/kernels/kv_cache.h"

namespace aclnn::fused {
namespace {

/// Whether `mode` names the FRACTAL_NZ order of a cache; refuses unknown names.
bool is_nz(const Call& call, const std::string& mode) {
  if (mode.empty() || mode == "Norm" || mode == "None") return false;
  if (mode != "PA_NZ") call.refuse("cacheMode", "has to be Norm or PA_NZ, not " + mode);
  return true;
}

kernels::CacheWrite write_of(const Call& call, const char* name, const Tensor& rows, const char* cache_name,
                             const Tensor& cache, const Tensor& slots, bool nz) {
  require_rank(call, name, rows, 3, 3);
  require_same_dtype(call, cache_name, cache, name, rows);
  require_contiguous(call, name, rows);
  kernels::CacheWrite write;
  write.cache = paged_cache(call, cache_name, cache, nz);
  write.rows = rows.data<char>();
  write.row_stride = rows.size(1) * rows.size(2) * static_cast<int64_t>(rows.itemsize());
  write.slots = slots.data();
  write.slots_are_64bit = slots.dtype == c10::ScalarType::Long;
  write.tokens = rows.size(0);
  if (write.cache.row_bytes() != write.row_stride)
    call.refuse(cache_name, "has rows of " + std::to_string(write.cache.row_bytes()) + " bytes, " + name +
                                " of " + std::to_string(write.row_stride) + ": " + describe(cache) + " and " +
                                describe(rows));
  return write;
}

}  // namespace

kernels::PagedCache paged_cache(const Call& call, const char* name, const Tensor& cache, bool nz) {
  require_rank(call, name, cache, 4, 4);
  if (cache.is_plain()) {
    require_contiguous(call, name, cache);
  } else if (!nz) {
    call.refuse(name, "is in FRACTAL_NZ, which cacheMode PA_NZ takes");
  }
  const auto item = static_cast<int64_t>(cache.itemsize());
  kernels::PagedCache result;
  result.memory = static_cast<char*>(cache.storage) + cache.offset * item;
  result.blocks = cache.size(0);
  result.block_stride = cache.stride(0) * item;
  if (!nz) {
    result.block_size = cache.size(1);
    result.row_stride = result.piece_bytes = cache.stride(1) * item;
    return result;
  }
  if (cache.size(3) * item != 32)
    call.refuse(name, "of cacheMode PA_NZ has to have a last dimension of " + std::to_string(32 / item) +
                          " elements (32 bytes), not " + describe(cache));
  result.block_size = cache.size(2);
  result.row_stride = result.piece_bytes = 32;
  result.pieces = cache.size(1);
  result.piece_stride = result.block_size * 32;
  return result;
}

Work scatter_pa_kv_cache(const Call& call, const ScatterPaKvCache& a) {
  for (const auto& [name, tensor] : {std::pair{"compressLens", a.compress_lens},
                                     {"compressSeqOffsets", a.compress_seq_offsets},
                                     {"seqLens", a.seq_lens}})
    if (tensor != nullptr) call.refuse(name, "(the compressed cache) is not implemented by the host runtime");
  const Tensor& slots = *a.slot_mapping;
  if (slots.dtype != c10::ScalarType::Int && slots.dtype != c10::ScalarType::Long)
    call.refuse("slotMapping", "has to be int32 or int64, not " + dtype_name(slots.dtype));
  require_contiguous(call, "slotMapping", slots);
  require_shape(call, "slotMapping", slots, {a.key->size(0)});
  const bool nz = is_nz(call, a.cache_mode);
  const kernels::CacheWrite keys = write_of(call, "key", *a.key, "keyCache", *a.key_cache, slots, nz);
  const kernels::CacheWrite values =
      write_of(call, "value", *a.value, "valueCache", *a.value_cache, slots, nz);
  if (a.key->size(0) != a.value->size(0) || a.key->size(1) != a.value->size(1))
    call.refuse("value", "has to have key's first two dimensions: key " + describe(*a.key) + ", value " +
                             describe(*a.value));
  return [keys, values] {
    kernels::write_cache(keys);
    kernels::write_cache(values);
  };
}

Work gather_pa_kv_cache(const Call& call, const GatherPaKvCache& a) {
  const bool nz = is_nz(call, a.cache_mode);
  for (const auto& [name, tensor] : {std::pair{"blockTables", a.block_tables}, {"seqLens", a.seq_lens}})
    require_dtype(call, name, *tensor, c10::ScalarType::Int);
  require_rank(call, "blockTables", *a.block_tables, 2, 2);
  require_contiguous(call, "blockTables", *a.block_tables);
  require_contiguous(call, "seqLens", *a.seq_lens);
  const int64_t requests = a.block_tables->size(0);
  require_shape(call, "seqLens", *a.seq_lens, {requests + (a.is_seq_lens_cumsum ? 1 : 0)});
  if (a.seq_offset != nullptr) {
    require_dtype(call, "seqOffset", *a.seq_offset, c10::ScalarType::Int);
    require_shape(call, "seqOffset", *a.seq_offset, {requests});
    require_contiguous(call, "seqOffset", *a.seq_offset);
  }
  const auto read_of = [&](const char* name, const Tensor& cache, const char* rows_name, const Tensor& rows) {
    require_same_dtype(call, rows_name, rows, name, cache);
    require_contiguous(call, rows_name, rows);
    kernels::CacheRead read;
    read.cache = paged_cache(call, name, cache, nz);
    read.rows = rows.data<char>();
    read.room = rows.size(0);
    read.row_stride = read.cache.row_bytes();
    if (static_cast<int64_t>(rows.nbytes()) != read.room * read.row_stride)
      call.refuse(rows_name, describe(rows) + " does not have the rows of " + name + " " + describe(cache));
    read.block_table = a.block_tables->data<int32_t>();
    read.table_stride = read.table_width = a.block_tables->size(1);
    read.lengths = a.seq_lens->data<int32_t>();
    read.starts = a.seq_offset == nullptr ? nullptr : a.seq_offset->data<int32_t>();
    read.cumulative = a.is_seq_lens_cumsum;
    read.requests = requests;
    return read;
  };
  const kernels::CacheRead keys = read_of("keyCache", *a.key_cache, "key", *a.key);
  const kernels::CacheRead values = read_of("valueCache", *a.value_cache, "value", *a.value);
  return [keys, values] {
    kernels::read_cache(keys);
    kernels::read_cache(values);
  };
}

}  // namespace aclnn::fused
