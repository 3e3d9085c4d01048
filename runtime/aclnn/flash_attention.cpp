// aclnnFlashAttentionScore and V2 (forward): torch's scaled_dot_product_attention reaches the first on npu.
#include <algorithm>
#include <memory>

#include "runtime/aclnn/attention_layout.h"
#include "runtime/aclnn/attention_operators.h"
#include "runtime/aclnn/fused_support.h"
#include "runtime/kernels/attention.h"

namespace aclnn::fused {
namespace {

constexpr int64_t kWidestHead = 768;
constexpr int64_t kStatisticCopies = 8;

std::string text(int64_t value) { return std::to_string(value); }

/// SBH is a layout of this operator only.
Axes flash_axes(const Call& call, const char* name, const Tensor& tensor, const std::string& layout,
                int64_t heads) {
  static const char* const kLayouts[] = {"BSH", "SBH", "BSND", "BNSD", "TND"};
  if (std::find(std::begin(kLayouts), std::end(kLayouts), layout) == std::end(kLayouts))
    call.refuse("inputLayout", "has to be BSH, SBH, BSND, BNSD or TND, not \"" + layout + "\"");
  return axes_of(call, name, tensor, layout, heads);
}

class Builder {
 public:
  Builder(Call& call, const FlashAttention& arguments) : call_(call), a_(arguments) {}

  Work build() {
    refuse_training();
    packed_ = a_.input_layout == "TND";
    set_tensors();
    set_statistics();
    set_sequences();
    set_mask();
    kernel_.plan();
    auto scratch = call_.workspace(kernels::attention_scratch(kernel_));
    auto kernel = std::make_shared<kernels::Attention>(std::move(kernel_));
    return [kernel, scratch] { kernels::attention(*kernel, scratch->address); };
  }

 private:
  void refuse_training() {
    if (a_.keep_prob != 1.0)
      call_.refuse("keepProb", "has to be 1 on the host runtime, which does not implement dropout; it is " +
                                   std::to_string(a_.keep_prob));
    if (a_.padding_mask != nullptr && a_.padding_mask->numel() > 0)
      call_.refuse("paddingMask", "is not implemented by the host runtime; use attenMask");
    if (a_.prefix && !a_.prefix->empty()) call_.refuse("prefix", "is not implemented by the host runtime");
    if (a_.head_num <= 0) call_.refuse("headNum", "has to be positive, not " + text(a_.head_num));
  }

  void set_tensors() {
    kernel_.type = float_type(call_, "query", *a_.query);
    query_ = flash_axes(call_, "query", *a_.query, a_.input_layout, a_.head_num);
    if (query_.heads != a_.head_num)
      call_.refuse("headNum", "is " + text(a_.head_num) + ", but query has " + text(query_.heads) + " heads");
    const bool joined = a_.input_layout.back() == 'H';
    if (joined && (query_.width == 0 || a_.key->size(-1) % query_.width != 0))
      call_.refuse("key", "has a last dimension that query's head size " + text(query_.width) +
                              " does not divide: " + describe(*a_.key));
    const int64_t key_heads = joined ? a_.key->size(-1) / query_.width : 0;
    key_ = flash_axes(call_, "key", *a_.key, a_.input_layout, key_heads);
    value_ = flash_axes(call_, "value", *a_.value, a_.input_layout, key_heads);
    output_ = flash_axes(call_, "attentionOut", *a_.attention_out, a_.input_layout, a_.head_num);
    require_same_dtype(call_, "key", *a_.key, "query", *a_.query);
    require_same_dtype(call_, "value", *a_.value, "query", *a_.query);
    require_same_dtype(call_, "attentionOut", *a_.attention_out, "query", *a_.query);
    if (key_.heads == 0 || query_.heads % key_.heads != 0 || value_.heads != key_.heads)
      call_.refuse("key", "and value need the same number of heads, one that divides query's " +
                              text(query_.heads) + "; key " + describe(*a_.key) + ", value " +
                              describe(*a_.value));
    if (key_.width != query_.width || value_.width > key_.width || key_.width > kWidestHead)
      call_.refuse("key", "needs query's head size " + text(query_.width) +
                              " (at most 768), and value at most that; key " + text(key_.width) + ", value " +
                              text(value_.width));
    if (key_.tokens != value_.tokens || (!packed_ && key_.batches != query_.batches) ||
        value_.batches != key_.batches)
      call_.refuse("key", describe(*a_.key) + " does not fit query " + describe(*a_.query) + " and value " +
                              describe(*a_.value));
    kernel_.query = rows_of(*a_.query, query_);
    kernel_.key = rows_of(*a_.key, key_);
    kernel_.value = rows_of(*a_.value, value_);
    kernel_.heads = query_.heads;
    kernel_.key_heads = key_.heads;
    kernel_.scale = static_cast<float>(a_.scale);
    kernel_.output = a_.attention_out->data();
    kernel_.output_row_stride = output_.token_stride;
    kernel_.output_head_stride = output_.head_stride;
  }

  /// softmaxMax and softmaxSum: [B, N, S, 8], or [T, N, 8]; every value eight times.
  void set_statistics() {
    const auto shape =
        packed_ ? std::vector<int64_t>{query_.tokens, query_.heads, kStatisticCopies}
                : std::vector<int64_t>{query_.batches, query_.heads, query_.tokens, kStatisticCopies};
    for (const auto& [name, tensor] :
         {std::pair{"softmaxMax", a_.softmax_max}, {"softmaxSum", a_.softmax_sum}}) {
      require_dtype(call_, name, *tensor, c10::ScalarType::Float);
      require_shape(call_, name, *tensor, shape);
      require_contiguous(call_, name, *tensor);
    }
    kernel_.lse_row_stride = packed_ ? query_.heads : 1;
    kernel_.lse_head_stride = packed_ ? 1 : query_.tokens;
    kernel_.row_max = a_.softmax_max->data<float>();
    kernel_.row_sum = a_.softmax_sum->data<float>();
  }

  void set_sequences() {
    if (packed_) return set_packed_sequences();
    for (int64_t i = 0; i < query_.batches; ++i) {
      kernels::Sequence sequence;
      sequence.query_offset = i * query_.batch_stride;
      sequence.key_offset = i * key_.batch_stride;
      sequence.value_offset = i * value_.batch_stride;
      sequence.output_offset = i * output_.batch_stride;
      sequence.lse_offset = i * query_.heads * query_.tokens;
      sequence.query_length = query_.tokens;
      sequence.key_length = key_.tokens;
      kernel_.sequences.push_back(sequence);
    }
  }

  void set_packed_sequences() {
    if (!a_.actual_seq_qlen || !a_.actual_seq_kvlen ||
        a_.actual_seq_qlen->size() != a_.actual_seq_kvlen->size())
      call_.refuse("actualSeqQLen", "and actualSeqKvLen have to be passed for layout TND, one end a request");
    int64_t query_start = 0;
    int64_t key_start = 0;
    for (size_t i = 0; i < a_.actual_seq_qlen->size(); ++i) {
      const int64_t query_end = (*a_.actual_seq_qlen)[i];
      const int64_t key_end = (*a_.actual_seq_kvlen)[i];
      if (query_end < query_start || key_end < key_start || query_end > query_.tokens ||
          key_end > key_.tokens)
        call_.refuse("actualSeqQLen",
                     "and actualSeqKvLen hold the end of every request, rising to the number of tokens");
      kernels::Sequence sequence;
      sequence.query_offset = query_start * query_.token_stride;
      sequence.output_offset = query_start * output_.token_stride;
      sequence.lse_offset = query_start * query_.heads;
      sequence.key_offset = key_start * key_.token_stride;
      sequence.value_offset = key_start * value_.token_stride;
      sequence.query_length = query_end - std::exchange(query_start, query_end);
      sequence.key_length = key_end - std::exchange(key_start, key_end);
      kernel_.sequences.push_back(sequence);
    }
    if (query_start != query_.tokens)
      call_.refuse("actualSeqQLen", "has to end with the number of query tokens, " + text(query_.tokens));
  }

  void set_mask() {
    const ScoreShape shape{query_.batches, query_.heads, query_.tokens, key_.tokens};
    set_shift();
    // "Without attenMask sparseMode, preTokens and nextTokens have no effect."
    const Tensor* mask = a_.atten_mask != nullptr && a_.atten_mask->numel() > 0 ? a_.atten_mask : nullptr;
    if (mask == nullptr) return;
    require_mask_dtype(call_, *mask, false);
    kernel_.band = band_of(call_, a_.sparse_mode, a_.pre_tokens, a_.next_tokens, true);
    if (compressed_mask(a_.sparse_mode)) {
      kernel_.causal_probe = compressed_mask_memory(call_, mask, a_.sparse_mode);
      return;
    }
    if (packed_) call_.refuse("attenMask", "of layout TND has to be a compressed one (sparseMode 2, 3 or 4)");
    const ScoreAxes axes = score_axes(call_, "attenMask", *mask, shape, false);
    kernel_.mask = mask->data<uint8_t>();
    kernel_.mask_head_stride = axes.head_stride;
    kernel_.mask_row_stride = axes.token_stride;
    for (int64_t i = 0; i < query_.batches; ++i) kernel_.sequences[i].mask_offset = i * axes.batch_stride;
  }

  /// [B, N, Sq, Sk], [B, N, 1, Sk] or [1, N, Sq, Sk].
  void set_shift() {
    constexpr int64_t kAddedToScaled = 0, kScaledToo = 1;
    if (a_.pse_type != kAddedToScaled && a_.pse_type != kScaledToo)
      call_.refuse("pseType", "has to be 0 or 1 on the host runtime, which makes no shift itself; it is " +
                                  text(a_.pse_type));
    if (a_.real_shift == nullptr || a_.real_shift->numel() == 0) return;
    const Tensor& shift = *a_.real_shift;
    if (packed_) call_.refuse("realShift", "is not implemented for layout TND by the host runtime");
    require_same_dtype(call_, "realShift", shift, "query", *a_.query);
    require_rank(call_, "realShift", shift, 4, 4);
    const bool one_row = shift.size(2) == 1;
    if (shift.size(1) != query_.heads || shift.size(3) != key_.tokens ||
        (one_row ? shift.size(0) != query_.batches : shift.size(2) != query_.tokens))
      call_.refuse("realShift", "has to be [B, N, Sq, Skv], [B, N, 1, Skv] or [1, N, Sq, Skv]; it is " +
                                    describe(shift) + " for query " + describe(*a_.query));
    const ScoreShape shape{query_.batches, query_.heads, one_row ? 1 : query_.tokens, key_.tokens};
    const ScoreAxes axes = score_axes(call_, "realShift", shift, shape, false);
    kernel_.bias = shift.data();
    kernel_.bias_head_stride = axes.head_stride;
    kernel_.bias_row_stride = one_row ? 0 : axes.token_stride;
    if (a_.pse_type == kScaledToo) kernel_.bias_scale = kernel_.scale;
    for (int64_t i = 0; i < query_.batches; ++i) kernel_.sequences[i].bias_offset = i * axes.batch_stride;
  }

  Call& call_;
  const FlashAttention& a_;
  kernels::Attention kernel_{};
  Axes query_, key_, value_, output_;
  bool packed_ = false;
};

}  // namespace

Work flash_attention(Call& call, const FlashAttention& arguments) { return Builder(call, arguments).build(); }

}  // namespace aclnn::fused
