// aclnnFusedInferAttentionScore: constraints as in its documents (V3 and V4); the deviations are in
// docs/llm_operators.md.
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "runtime/aclnn/attention_layout.h"
#include "runtime/aclnn/attention_operators.h"
#include "runtime/aclnn/fused_support.h"
#include "runtime/kernels/attention.h"

namespace aclnn::fused {
namespace {

constexpr int64_t kMostHeads = 256;
constexpr int64_t kWidestHead = 512;
constexpr int64_t kMostSharing = 64;
constexpr int64_t kMostPackedRequests = 4096;
constexpr int64_t kWidestCacheRow = 65535;

std::string text(int64_t value) { return std::to_string(value); }

class Builder {
 public:
  Builder(Call& call, const FusedInferAttention& arguments)
      : call_(call), a_(arguments), layout_(input_layout(call, arguments.input_layout)) {}

  Work build() {
    check_flags();
    set_query();
    if (a_.block_table != nullptr) {
      set_paged_keys();
    } else {
      set_keys();
    }
    set_rope();
    set_output();
    set_sequences();
    set_mask();
    set_bias();
    return finish();
  }

 private:
  void check_flags() {
    for (const auto& [name, value] : a_.unsupported)
      if (value != nullptr) call_.refuse(name, "is not implemented by the host runtime; leave it out");
    if (a_.inner_precise < 0 || a_.inner_precise > 3)
      call_.refuse("innerPrecise", "has to be 0 to 3, not " + text(a_.inner_precise));
    key_heads_ = a_.num_key_value_heads == 0 ? a_.num_heads : a_.num_key_value_heads;
    if (a_.num_heads <= 0 || a_.num_heads > kMostHeads)
      call_.refuse("numHeads", "has to be 1 to 256, not " + text(a_.num_heads));
    if (key_heads_ <= 0 || a_.num_heads % key_heads_ != 0 || a_.num_heads / key_heads_ > kMostSharing)
      call_.refuse("numKeyValueHeads", "has to divide numHeads " + text(a_.num_heads) +
                                           " with a quotient of at most 64, but is " + text(key_heads_));
    if (a_.key->size() == 0 || a_.key->size() != a_.value->size())
      call_.refuse("value", "has to be a list as long as key, and not empty");
  }

  void set_query() {
    kernel_.type = float_type(call_, "query", *a_.query);
    query_ = axes_of(call_, "query", *a_.query, layout_.query, a_.num_heads);
    if (query_.heads != a_.num_heads)
      call_.refuse("numHeads", "is " + text(a_.num_heads) + ", but query " + describe(*a_.query) +
                                   " in layout " + layout_.query + " has " + text(query_.heads) + " heads");
    check_width("query", query_.width);
    kernel_.query = rows_of(*a_.query, query_);
    kernel_.heads = a_.num_heads;
    kernel_.key_heads = key_heads_;
    kernel_.scale = static_cast<float>(a_.scale);
    single_token_ = !layout_.packed() && query_.tokens == 1;
    if (layout_.packed()) {
      if (!a_.actual_seq_lengths || !a_.actual_seq_lengths_kv)
        call_.refuse("actualSeqLengths", "and actualSeqLengthsKv are needed for layout " + a_.input_layout);
      batches_ = static_cast<int64_t>(a_.actual_seq_lengths->size());
      if (batches_ == 0 || batches_ > kMostPackedRequests)
        call_.refuse("actualSeqLengths", "has to have 1 to 4096 elements, not " + text(batches_));
    } else {
      batches_ = query_.batches;
    }
  }

  void check_width(const char* name, int64_t width) {
    if (width % 16 != 0 || width > kWidestHead)
      call_.refuse(name,
                   "has head size " + text(width) + ", which has to be a multiple of 16 and at most 512");
  }

  void check_key(const char* name, const Tensor& tensor, int64_t heads, int64_t width) {
    require_same_dtype(call_, name, tensor, "query", *a_.query);
    if (heads != key_heads_)
      call_.refuse(name, "has " + text(heads) + " heads, but numKeyValueHeads is " + text(key_heads_) +
                             "; it is " + describe(tensor));
    check_width(name, width);
  }

  void set_keys() {
    const Tensor& key = (*a_.key)[0];
    const Tensor& value = (*a_.value)[0];
    key_axes_ = axes_of(call_, "key", key, layout_.query, key_heads_);
    value_axes_ = axes_of(call_, "value", value, layout_.query, key_heads_);
    check_key("key", key, key_axes_.heads, key_axes_.width);
    check_key("value", value, value_axes_.heads, value_axes_.width);
    if (key_axes_.width != query_.width)
      call_.refuse("key", "has head size " + text(key_axes_.width) + ", query " + text(query_.width));
    if (key_axes_.tokens != value_axes_.tokens)
      call_.refuse("value", "has " + text(value_axes_.tokens) + " tokens, key " + text(key_axes_.tokens));
    if (a_.key->size() > 1) {
      check_list();
    } else if (!layout_.packed() && key_axes_.batches != query_.batches) {
      call_.refuse("key", "has batch " + text(key_axes_.batches) + ", query " + text(query_.batches));
    }
    kernel_.key = rows_of(key, key_axes_);
    kernel_.value = rows_of(value, value_axes_);
  }

  /// One tensor a request, each with batch 1.
  void check_list() {
    if (layout_.packed()) call_.refuse("key", "has to be one tensor for layout " + a_.input_layout);
    if (static_cast<int64_t>(a_.key->size()) != query_.batches)
      call_.refuse("key", "is a list of " + text(static_cast<int64_t>(a_.key->size())) +
                              " tensors for a batch of " + text(query_.batches));
    for (size_t i = 0; i < a_.key->size(); ++i) {
      const Axes key = axes_of(call_, "key", (*a_.key)[i], layout_.query, key_heads_);
      const Axes value = axes_of(call_, "value", (*a_.value)[i], layout_.query, key_heads_);
      if (key.batches != 1 || value.batches != 1 || key.tokens != value.tokens ||
          key.width != key_axes_.width || value.width != value_axes_.width ||
          key.token_stride != key_axes_.token_stride || value.token_stride != value_axes_.token_stride)
        call_.refuse(
            "key",
            "and value lists have to hold tensors of batch 1 and the same heads and head size; element " +
                text(static_cast<int64_t>(i)) + " is " + describe((*a_.key)[i]));
      // Heads lie tokens apart in BNSD, so requests of different lengths would need a stride each.
      if (key.head_stride != key_axes_.head_stride || value.head_stride != value_axes_.head_stride)
        call_.refuse("key", "lists of different lengths need layout BSH or BSND on the host runtime");
    }
  }

  void set_paged_keys() {
    const Tensor& table = *a_.block_table;
    require_dtype(call_, "blockTable", table, c10::ScalarType::Int);
    require_rank(call_, "blockTable", table, 2, 2);
    if (table.size(0) != batches_)
      call_.refuse("blockTable", "has " + text(table.size(0)) + " rows for " + text(batches_) + " requests");
    if (table.stride(1) != 1) require_contiguous(call_, "blockTable", table);
    if (a_.key->size() != 1) call_.refuse("key", "has to be one tensor with a block table");
    if (!a_.actual_seq_lengths_kv) call_.refuse("actualSeqLengthsKv", "is needed with a block table");
    check_block_size();
    kernel_.key = paged_rows("key", (*a_.key)[0]);
    kernel_.value = paged_rows("value", (*a_.value)[0]);
    if (kernel_.key.width != query_.width)
      call_.refuse("key", "has head size " + text(kernel_.key.width) + ", query " + text(query_.width));
    kernel_.block_table = table.data<int32_t>();
    kernel_.block_size = a_.block_size;
    kernel_.blocks = (*a_.key)[0].size(0);
  }

  void check_block_size() {
    const int64_t size = a_.block_size;
    if (single_token_ || (a_.query_rope != nullptr && query_.width == kWidestHead)) {
      if (size <= 0 || size % 16 != 0 || size > 512)
        call_.refuse(
            "blockSize",
            "has to be a multiple of 16 and at most 512 for single-token queries, not " + text(size));
    } else if (size <= 0 || size % 128 != 0 || size > 1024) {
      call_.refuse("blockSize",
                   "has to be a multiple of 128 and at most 1024 (512 outside TND), not " + text(size));
    }
  }

  /// A cache [blocks, block size, heads * d], [blocks, heads, block size, d] or, in pieces of 32 bytes,
  /// [blocks, heads, d / 16, block size, 16].
  kernels::HeadRows paged_rows(const char* name, const Tensor& cache) {
    require_contiguous(call_, name, cache);
    require_rank(call_, name, cache, 3, 5);
    kernels::HeadRows rows;
    rows.base = cache.data();
    rows.block_stride = cache.stride(0);
    int64_t heads = key_heads_;
    int64_t block_size = 0;
    if (cache.dim() == 3) {
      rows.width = cache.size(2) / key_heads_;
      if (rows.width * key_heads_ != cache.size(2) || cache.size(2) > kWidestCacheRow)
        call_.refuse(name, "has rows of " + text(cache.size(2)) +
                               " elements, which have to be numKeyValueHeads " + text(key_heads_) +
                               " times the head size and at most 65535");
      block_size = cache.size(1);
      rows.row_stride = cache.size(2);
      rows.head_stride = rows.width;
      rows.chunk = rows.width;
    } else if (cache.dim() == 4) {
      if (layout_.query == "BSH" || layout_.query == "BSND")
        call_.refuse(name, "has to be [blocks, block size, heads * head size] for layout " + a_.input_layout +
                               ", not " + describe(cache));
      heads = cache.size(1);
      block_size = cache.size(2);
      rows.width = rows.chunk = rows.row_stride = cache.size(3);
      rows.head_stride = cache.stride(1);
    } else {
      heads = cache.size(1);
      block_size = cache.size(3);
      rows.chunk = rows.row_stride = cache.size(4);
      rows.width = cache.size(2) * cache.size(4);
      rows.chunk_stride = cache.stride(2);
      rows.head_stride = cache.stride(1);
      check_nz(name, cache, rows.width);
    }
    if (block_size != a_.block_size)
      call_.refuse("blockSize", "is " + text(a_.block_size) + ", but " + name + " " + describe(cache) +
                                    " has blocks of " + text(block_size) +
                                    " ([blocks, block size, heads * d] and "
                                    "[blocks, heads, block size, d] are the layouts)");
    check_key(name, cache, heads, rows.width);
    return rows;
  }

  /// Keys in the order of FRACTAL_NZ: what CANN takes them for.
  void check_nz(const char* name, const Tensor& cache, int64_t width) {
    const int64_t piece = 32 / static_cast<int64_t>(cache.itemsize());
    if (cache.size(4) != piece)
      call_.refuse(name, "of five dimensions has to be [blocks, heads, head size / " + text(piece) +
                             ", block size, " + text(piece) + "] (pieces of 32 bytes), not " +
                             describe(cache));
    const bool latent = a_.query_rope != nullptr;
    if (!latent && width != 64 && width != 128)
      call_.refuse(name, "of five dimensions (FRACTAL_NZ) needs head size 64 or 128, not " + text(width) +
                             "; use [blocks, block size, heads * head size]");
    if (layout_.query == "NSD" || (latent && layout_.query == "BNSD"))
      call_.refuse(name, "of five dimensions (FRACTAL_NZ) does not go with layout " + a_.input_layout);
    if (latent && a_.block_size != 128)
      call_.refuse("blockSize", "has to be 128 for latent attention with keys of five dimensions, not " +
                                    text(a_.block_size));
  }

  void set_rope() {
    if ((a_.query_rope == nullptr) != (a_.key_rope == nullptr))
      call_.refuse("keyRope", "and queryRope have to be passed together");
    if (a_.query_rope == nullptr) return;
    require_same_dtype(call_, "queryRope", *a_.query_rope, "query", *a_.query);
    query_rope_ = axes_of(call_, "queryRope", *a_.query_rope, layout_.query, a_.num_heads);
    if (query_rope_.heads != query_.heads || query_rope_.tokens != query_.tokens ||
        query_rope_.width % 16 != 0)
      call_.refuse("queryRope", "has to be query " + describe(*a_.query) +
                                    " but for its head size, a multiple of 16; it is " +
                                    describe(*a_.query_rope));
    kernel_.query_rope = rows_of(*a_.query_rope, query_rope_);
    if (a_.block_table != nullptr) {
      kernel_.key_rope = paged_rows("keyRope", *a_.key_rope);
    } else {
      key_rope_ = axes_of(call_, "keyRope", *a_.key_rope, layout_.query, key_heads_);
      require_same_dtype(call_, "keyRope", *a_.key_rope, "query", *a_.query);
      kernel_.key_rope = rows_of(*a_.key_rope, key_rope_);
    }
    if (kernel_.key_rope.width != kernel_.query_rope.width)
      call_.refuse("keyRope", "has head size " + text(kernel_.key_rope.width) + ", queryRope " +
                                  text(kernel_.query_rope.width));
  }

  void set_output() {
    output_ = axes_of(call_, "attentionOut", *a_.attention_out, layout_.output, a_.num_heads);
    require_same_dtype(call_, "attentionOut", *a_.attention_out, "query", *a_.query);
    if (output_.heads != query_.heads || output_.tokens != query_.tokens ||
        output_.batches != query_.batches || output_.width != kernel_.value.width)
      call_.refuse("attentionOut", "is " + describe(*a_.attention_out) + ", which is not query's shape " +
                                       describe(*a_.query) + " in layout " + layout_.output +
                                       " with value's head size " + text(kernel_.value.width));
    kernel_.output = a_.attention_out->data();
    kernel_.output_row_stride = output_.token_stride;
    kernel_.output_head_stride = output_.head_stride;
    if (a_.learnable_sink != nullptr) {
      require_dtype(call_, "learnableSink", *a_.learnable_sink, a_.query->dtype);
      require_shape(call_, "learnableSink", *a_.learnable_sink, {a_.num_heads});
      sink_ = share(a_.learnable_sink);
    }
    if (!a_.softmax_lse_flag) return;
    const Tensor* lse = a_.softmax_lse;
    if (lse == nullptr) call_.null_argument("softmaxLse");
    require_dtype(call_, "softmaxLse", *lse, c10::ScalarType::Float);
    require_contiguous(call_, "softmaxLse", *lse);
    if (layout_.packed()) {
      require_shape(call_, "softmaxLse", *lse, {query_.tokens, query_.heads, 1});
      kernel_.lse_row_stride = query_.heads;
      kernel_.lse_head_stride = 1;
    } else {
      require_shape(call_, "softmaxLse", *lse, {query_.batches, query_.heads, query_.tokens, 1});
      kernel_.lse_row_stride = 1;
      kernel_.lse_head_stride = query_.tokens;
    }
    kernel_.lse = lse->data<float>();
    kernel_.row_empty_lse = std::numeric_limits<float>::infinity();
  }

  /// Lengths of a padded layout: one for all, or one a request.
  int64_t padded_length(const char* name, at::OptionalIntArrayRef lengths, int64_t request, int64_t most) {
    if (!lengths) return most;
    const auto count = static_cast<int64_t>(lengths->size());
    if (count != 1 && count < batches_)
      call_.refuse(name, "has to have 1 or " + text(batches_) + " elements, not " + text(count));
    const int64_t length = (*lengths)[count == 1 ? 0 : request];
    if (length < 0 || length > most)
      call_.refuse(name, "has " + text(length) + " for request " + text(request) + ", which has room for " +
                             text(most));
    return length;
  }

  /// Ends [request] of a packed layout, each at or behind the one before.
  void check_ends(const char* name, at::IntArrayRef ends, int64_t total) {
    int64_t previous = 0;
    for (const int64_t end : ends) {
      if (end < previous)
        call_.refuse(name, "holds the end of every request in layout " + a_.input_layout +
                               ", so no element may be below the one before: " + text(end) + " follows " +
                               text(previous));
      previous = end;
    }
    if (previous != total)
      call_.refuse(
          name, "has to end with the number of tokens, " + text(total) + ", but ends with " + text(previous));
  }

  int64_t cache_room() const {
    if (a_.block_table != nullptr) return a_.block_table->size(1) * a_.block_size;
    return key_axes_.tokens;
  }

  void set_sequences() {
    if (layout_.packed()) {
      check_ends("actualSeqLengths", *a_.actual_seq_lengths, query_.tokens);
      if (a_.block_table == nullptr) {
        check_ends("actualSeqLengthsKv", *a_.actual_seq_lengths_kv, key_axes_.tokens);
        if (a_.actual_seq_lengths_kv->size() != a_.actual_seq_lengths->size())
          call_.refuse("actualSeqLengthsKv", "has to have one element a request (" + text(batches_) + ")");
      }
    }
    kernel_.sequences.reserve(static_cast<size_t>(batches_));
    for (int64_t i = 0; i < batches_; ++i) kernel_.sequences.push_back(sequence(i));
  }

  kernels::Sequence sequence(int64_t i) {
    kernels::Sequence result;
    const bool paged = a_.block_table != nullptr;
    if (layout_.packed()) {
      const at::IntArrayRef ends = *a_.actual_seq_lengths;
      const int64_t start = i == 0 ? 0 : ends[i - 1];
      result.query_length = ends[i] - start;
      result.query_offset = start * query_.token_stride;
      result.query_rope_offset = start * query_rope_.token_stride;
      result.output_offset = start * output_.token_stride;
      result.lse_offset = start * kernel_.lse_row_stride;
    } else {
      result.query_length =
          single_token_ ? 1 : padded_length("actualSeqLengths", a_.actual_seq_lengths, i, query_.tokens);
      result.query_offset = i * query_.batch_stride;
      result.query_rope_offset = i * query_rope_.batch_stride;
      result.output_offset = i * output_.batch_stride;
      result.lse_offset = i * query_.heads * query_.tokens;
    }
    if (layout_.packed() && !paged) {
      const at::IntArrayRef ends = *a_.actual_seq_lengths_kv;
      const int64_t start = i == 0 ? 0 : ends[i - 1];
      result.key_length = ends[i] - start;
      result.key_offset = start * key_axes_.token_stride;
      result.value_offset = start * value_axes_.token_stride;
      result.key_rope_offset = start * key_rope_.token_stride;
      return result;
    }
    int64_t room = cache_room();
    if (a_.key->size() > 1) {
      room = axes_of(call_, "key", (*a_.key)[i], layout_.query, key_heads_).tokens;
      result.key_offset = distance((*a_.key)[i], (*a_.key)[0]);
      result.value_offset = distance((*a_.value)[i], (*a_.value)[0]);
    } else if (!paged) {
      result.key_offset = i * key_axes_.batch_stride;
      result.value_offset = i * value_axes_.batch_stride;
      result.key_rope_offset = i * key_rope_.batch_stride;
    } else {
      result.table_offset = i * a_.block_table->stride(0);
    }
    result.key_length = padded_length("actualSeqLengthsKv", a_.actual_seq_lengths_kv, i, room);
    return result;
  }

  static int64_t distance(const Tensor& to, const Tensor& from) {
    return (to.data<char>() - from.data<char>()) / static_cast<int64_t>(from.itemsize());
  }

  void set_mask() {
    const Tensor* mask = a_.atten_mask;
    // "When Q_S is 1 the parameter has no effect": the one query of a request sees all of its keys.
    const int64_t mode =
        single_token_ && a_.query_rope == nullptr && compressed_mask(a_.sparse_mode) ? 0 : a_.sparse_mode;
    if (mode != a_.sparse_mode) mask = nullptr;
    if (layout_.packed() && mode != 3 && (mode != 0 || mask != nullptr))
      call_.refuse("sparseMode", "has to be 0 without attenMask or 3 with it for layout " + a_.input_layout +
                                     ", not " + text(mode) + (mask == nullptr ? " without" : " with"));
    if (mask != nullptr) require_mask_dtype(call_, *mask, true);
    kernel_.band = band_of(call_, mode, a_.pre_tokens, a_.next_tokens, mask != nullptr);
    if (compressed_mask(mode)) {
      kernel_.causal_probe = compressed_mask_memory(call_, mask, mode);
      return;
    }
    if (mode == 1 && mask == nullptr) call_.refuse("attenMask", "is needed for sparseMode 1");
    if (mask == nullptr) return;
    const ScoreAxes axes = score_axes(call_, "attenMask", *mask, score_shape(), single_token_);
    kernel_.mask = mask->data<uint8_t>();
    kernel_.mask_head_stride = axes.head_stride;
    kernel_.mask_row_stride = axes.token_stride;
    for (int64_t i = 0; i < batches_; ++i) kernel_.sequences[i].mask_offset = i * axes.batch_stride;
  }

  ScoreShape score_shape() const {
    int64_t keys = cache_room();
    for (size_t i = 1; i < a_.key->size(); ++i)
      for (const kernels::Sequence& sequence : kernel_.sequences) keys = std::max(keys, sequence.key_length);
    return {batches_, query_.heads, query_.tokens, keys};
  }

  void set_bias() {
    if (a_.pse_shift == nullptr) return;
    if (layout_.packed()) call_.refuse("pseShift", "is not supported for layout " + a_.input_layout);
    require_same_dtype(call_, "pseShift", *a_.pse_shift, "query", *a_.query);
    require_rank(call_, "pseShift", *a_.pse_shift, 4, 4);
    const ScoreAxes axes = score_axes(call_, "pseShift", *a_.pse_shift, score_shape(), false);
    kernel_.bias = a_.pse_shift->data();
    kernel_.bias_head_stride = axes.head_stride;
    kernel_.bias_row_stride = axes.token_stride;
    for (int64_t i = 0; i < batches_; ++i) kernel_.sequences[i].bias_offset = i * axes.batch_stride;
  }

  Work finish() {
    const bool padded = std::any_of(
        kernel_.sequences.begin(), kernel_.sequences.end(),
        [&](const auto& sequence) { return !layout_.packed() && sequence.query_length < query_.tokens; });
    kernel_.plan();
    auto scratch = call_.workspace(kernels::attention_scratch(kernel_));
    auto kernel = std::make_shared<kernels::Attention>(std::move(kernel_));
    if (!padded && sink_ == nullptr)
      return [kernel, scratch] { kernels::attention(*kernel, scratch->address); };
    // Rows behind a request's length: zeros, and +inf for their log-sum-exp.
    at::Tensor output = view(*a_.attention_out);
    at::Tensor lse = kernel->lse == nullptr ? at::Tensor() : view(*a_.softmax_lse);
    at::Tensor sink = sink_ == nullptr ? at::Tensor() : view(*sink_);
    return [kernel, scratch, output, lse, sink, padded] {
      at::AutoDispatchBelowADInplaceOrView guard;
      if (padded) output.zero_();
      if (padded && lse.defined()) lse.fill_(std::numeric_limits<float>::infinity());
      const at::Tensor floats = sink.defined() ? sink.to(at::kFloat).contiguous() : at::Tensor();
      kernels::Attention arguments = *kernel;
      if (floats.defined()) arguments.sink = floats.const_data_ptr<float>();
      kernels::attention(arguments, scratch->address);
    };
  }

  Call& call_;
  const FusedInferAttention& a_;
  InputLayout layout_;
  kernels::Attention kernel_{};
  Axes query_, query_rope_, key_axes_, value_axes_, key_rope_, output_;
  TensorRef sink_;
  int64_t key_heads_ = 1;
  int64_t batches_ = 0;
  bool single_token_ = false;
};

}  // namespace

Work fused_infer_attention(Call& call, const FusedInferAttention& arguments) {
  return Builder(call, arguments).build();
}

}  // namespace aclnn::fused
