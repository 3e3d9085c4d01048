#include "runtime/aclnn/expert_exchange.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <cstring>

#include "runtime/aclnn/fused_support.h"
#include "runtime/aclnn/quant_operators.h"

namespace aclnn::fused {
namespace {

using host_runtime::ExpertExchange;
using host_runtime::Parts;
using host_runtime::RankGroupPtr;

constexpr int64_t kDispatchHeader = 64, kCombineHeader = 44;  // bytes that a row needs of HCCL's buffer
constexpr int64_t kAssist = 128;                              // numbers that a row has in `assist`
constexpr int64_t kNoted = 2;                                 // of them used here: rank and place

/// Writes values one after the other.
class Writer {
 public:
  explicit Writer(std::vector<std::byte>& out) : out_(out) {}
  void put(const void* data, size_t bytes) {
    const auto* first = static_cast<const std::byte*>(data);
    out_.insert(out_.end(), first, first + bytes);
  }

 private:
  std::vector<std::byte>& out_;
};

/// Reads what a Writer of another rank has written.
class Reader {
 public:
  explicit Reader(const std::vector<std::byte>& in) : in_(in) {}
  template <typename T = std::byte>
  const T* take(size_t count) {
    TORCH_CHECK(at_ + count * sizeof(T) <= in_.size(), "a rank sent less than it said");
    const auto* found = reinterpret_cast<const T*>(in_.data() + at_);
    at_ += count * sizeof(T);
    return found;
  }

 private:
  const std::vector<std::byte>& in_;
  size_t at_ = 0;
};

/// Which places (token * k + j) go to each expert, in the order of the tokens.
std::vector<std::vector<int32_t>> places_by_expert(const at::Tensor& ids, const at::Tensor& active,
                                                   int64_t experts) {
  const int64_t k = ids.size(1);
  const at::Tensor numbers = ids.contiguous();
  const at::Tensor mask = active.defined() ? active.contiguous() : at::Tensor();
  const auto* id = numbers.const_data_ptr<int32_t>();
  const auto* on = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  std::vector<std::vector<int32_t>> places(static_cast<size_t>(experts));
  for (int64_t place = 0; place < numbers.numel(); ++place) {
    const int64_t token = place / k;
    if (on != nullptr && mask.dim() == 1) {
      TORCH_CHECK(token == 0 || on[token - 1] || !on[token], "xActiveMask has an active token (", token,
                  ") behind one that is not: of one dimension, true has to be in front of false");
    }
    if (on != nullptr && !on[mask.dim() == 1 ? token : place]) continue;
    TORCH_CHECK(id[place] >= 0 && id[place] < experts, "expertIds has expert ", id[place], " for token ",
                token, ", but there are ", experts);
    places[static_cast<size_t>(id[place])].push_back(static_cast<int32_t>(place));
  }
  return places;
}

/// The tensors of a dispatch, as its task holds them.
struct Dispatching {
  ExpertWorld world;
  ExpertExchange what;
  RankGroupPtr group;
  std::string label;
  int64_t counts_type, quant_mode, room;
  at::Tensor x, ids, active, smooth, rows, scales, assist, counts, received;

  void run() const {
    const Parts came = group->exchange(what, outgoing(), label.c_str());
    arrange(came);
  }

  /// For each rank: how many rows its experts get, their places, the rows, and their scales.
  Parts outgoing() const {
    const auto places = places_by_expert(ids, active, world.experts);
    std::vector<int64_t> tokens, experts;
    for (int64_t expert = 0; expert < world.experts; ++expert) {
      for (const int32_t place : places[static_cast<size_t>(expert)]) {
        tokens.push_back(place / ids.size(1));
        experts.push_back(expert);
      }
    }
    const auto [sent, scale] = payload(at::tensor(tokens, at::kLong), at::tensor(experts, at::kLong));
    const auto row_bytes = static_cast<size_t>(sent.size(1)) * sent.element_size();
    Parts parts(static_cast<size_t>(world.ranks));
    size_t first = 0;
    for (int64_t rank = 0; rank < world.ranks; ++rank) {
      Writer part(parts[static_cast<size_t>(rank)]);
      const auto own = places.begin() + rank * world.experts_each();
      size_t total = 0;
      for (auto list = own; list != own + world.experts_each(); ++list) {
        const auto count = static_cast<int32_t>(list->size());
        part.put(&count, sizeof(count));
        total += list->size();
      }
      for (auto list = own; list != own + world.experts_each(); ++list)
        part.put(list->data(), list->size() * sizeof(int32_t));
      if (scale.defined()) part.put(scale.const_data_ptr<float>() + first, total * sizeof(float));
      part.put(static_cast<const std::byte*>(sent.const_data_ptr()) + first * row_bytes, total * row_bytes);
      first += total;
    }
    return parts;
  }

  /// Rows by expert, and their scales where they are quantized.
  std::pair<at::Tensor, at::Tensor> payload(const at::Tensor& tokens, const at::Tensor& experts) const {
    const at::Tensor picked = x.index_select(0, tokens);
    if (quant_mode == 0) return {picked, at::Tensor()};
    at::Tensor wide = picked.to(at::kFloat);
    if (smooth.defined()) wide = wide * smooth.index_select(0, experts);
    auto [quantized, scale] = dynamically_quantized(wide);
    return {quantized.contiguous(), scale.to(at::kFloat).reshape({-1}).contiguous()};
  }

  /// Puts what came in the order of the experts, and for each of the ranks.
  void arrange(const Parts& came) const {
    const auto each = static_cast<size_t>(world.experts_each());
    const auto row_bytes = static_cast<size_t>(rows.size(1)) * rows.element_size();
    std::vector<const int32_t*> sizes, places;
    std::vector<const float*> scale;
    std::vector<const std::byte*> data;
    for (const auto& part : came) {
      Reader in(part);
      sizes.push_back(in.take<int32_t>(each));
      size_t total = 0;
      for (size_t expert = 0; expert < each; ++expert) total += static_cast<size_t>(sizes.back()[expert]);
      places.push_back(in.take<int32_t>(total));
      scale.push_back(quant_mode == 0 ? nullptr : in.take<float>(total));
      data.push_back(in.take(total * row_bytes));
    }
    std::vector<size_t> taken(came.size(), 0);
    auto* noted = assist.mutable_data_ptr<int32_t>();
    auto* ends = received.mutable_data_ptr<int32_t>();
    auto* numbers = counts.mutable_data_ptr<int64_t>();
    auto* out = static_cast<std::byte*>(rows.mutable_data_ptr());
    size_t row = 0;
    for (size_t expert = 0; expert < each; ++expert) {
      const size_t start = row;
      for (size_t rank = 0; rank < came.size(); ++rank) {
        const auto count = static_cast<size_t>(sizes[rank][expert]);
        TORCH_CHECK(static_cast<int64_t>(row + count) <= room, "more than ", room,
                    " rows came: a token names an expert twice");
        std::memcpy(out + row * row_bytes, data[rank] + taken[rank] * row_bytes, count * row_bytes);
        if (quant_mode != 0)
          std::memcpy(scales.mutable_data_ptr<float>() + row, scale[rank] + taken[rank],
                      count * sizeof(float));
        for (size_t index = 0; index < count; ++index, ++row) {
          noted[row * kNoted] = static_cast<int32_t>(rank);
          noted[row * kNoted + 1] = places[rank][taken[rank] + index];
        }
        taken[rank] += count;
        ends[expert * came.size() + rank] = static_cast<int32_t>(row);
      }
      numbers[expert] = static_cast<int64_t>(counts_type == 0 ? row : row - start);
    }
  }
};

/// The tensors of a combine, as its task holds them.
struct Combining {
  ExpertWorld world;
  ExpertExchange what;
  RankGroupPtr group;
  std::string label;
  at::Tensor rows, ids, assist, received, weights, active, shared, out;

  void run() const {
    const Parts came = group->exchange(what, outgoing(), label.c_str());
    add_up(came);
  }

  /// For each rank: how many rows, their places there, the rows.
  Parts outgoing() const {
    const int32_t total = received.const_data_ptr<int32_t>()[received.numel() - 1];
    TORCH_CHECK(total >= 0 && total <= rows.size(0), "epSendCounts says ", total, " rows, of ", rows.size(0),
                ": it has to be what the dispatch gave");
    const auto* noted = assist.const_data_ptr<int32_t>();
    std::vector<std::vector<int32_t>> from(static_cast<size_t>(world.ranks));
    for (int32_t row = 0; row < total; ++row) {
      const int32_t rank = noted[row * kNoted];
      TORCH_CHECK(rank >= 0 && rank < world.ranks, "assistInfoForCombine has rank ", rank,
                  ": it has to be what the dispatch gave");
      from[static_cast<size_t>(rank)].push_back(row);
    }
    const auto row_bytes = static_cast<size_t>(rows.size(1)) * rows.element_size();
    const auto* data = static_cast<const std::byte*>(rows.const_data_ptr());
    Parts parts(from.size());
    for (size_t rank = 0; rank < from.size(); ++rank) {
      Writer part(parts[rank]);
      const auto count = static_cast<int32_t>(from[rank].size());
      part.put(&count, sizeof(count));
      for (const int32_t row : from[rank]) part.put(&noted[row * kNoted + 1], sizeof(int32_t));
      for (const int32_t row : from[rank]) part.put(data + static_cast<size_t>(row) * row_bytes, row_bytes);
    }
    return parts;
  }

  void add_up(const Parts& came) const {
    const int64_t tokens = ids.size(0), k = ids.size(1), hidden = rows.size(1);
    const auto row_bytes = static_cast<size_t>(hidden) * rows.element_size();
    at::Tensor back = at::zeros({tokens * k, hidden}, rows.options());
    auto* into = static_cast<std::byte*>(back.mutable_data_ptr());
    for (const auto& part : came) {
      Reader in(part);
      const auto count = static_cast<size_t>(*in.take<int32_t>(1));
      const auto* places = in.take<int32_t>(count);
      const auto* data = in.take(count * row_bytes);
      for (size_t index = 0; index < count; ++index) {
        TORCH_CHECK(places[index] >= 0 && places[index] < tokens * k, "a row came back for place ",
                    places[index], " of ", tokens * k);
        std::memcpy(into + static_cast<size_t>(places[index]) * row_bytes, data + index * row_bytes,
                    row_bytes);
      }
    }
    const at::Tensor scale =
        active.defined() && active.dim() == 2 ? weights.masked_fill(active.logical_not(), 0.0) : weights;
    const at::Tensor wide = back.to(at::kFloat).view({tokens, k, hidden});
    at::Tensor total = wide.select(1, 0) * scale.select(1, 0).unsqueeze(1);
    for (int64_t j = 1; j < k; ++j) total = total + wide.select(1, j) * scale.select(1, j).unsqueeze(1);
    if (shared.defined()) total = total + shared.reshape({tokens, hidden}).to(at::kFloat);
    const int64_t written = first_inactive(tokens);
    out.narrow(0, 0, written).copy_(total.narrow(0, 0, written));
  }

  int64_t first_inactive(int64_t tokens) const {
    return active.defined() && active.dim() == 1 ? active.sum().item<int64_t>() : tokens;
  }
};

at::Tensor view_of(const Tensor* tensor) { return tensor == nullptr ? at::Tensor() : view(*tensor); }

void require_half(const Call& call, const char* name, const Tensor& tensor) {
  if (tensor.dtype != c10::ScalarType::Half && tensor.dtype != c10::ScalarType::BFloat16)
    call.refuse(name, "has to be float16 or bfloat16, not " + dtype_name(tensor.dtype));
}

void require_result(const Call& call, const char* name, const Tensor& tensor, c10::ScalarType dtype,
                    c10::ArrayRef<int64_t> shape) {
  require_dtype(call, name, tensor, dtype);
  require_shape(call, name, tensor, shape);
  require_contiguous(call, name, tensor);
}

/// A one-dimensional tensor that both operators hand over, of at least so many elements.
void require_noted(const Call& call, const char* name, const Tensor& tensor, int64_t elements) {
  require_dtype(call, name, tensor, c10::ScalarType::Int);
  require_rank(call, name, tensor, 1, 1);
  require_contiguous(call, name, tensor);
  if (tensor.numel() < elements)
    call.refuse(name,
                "has to have at least " + std::to_string(elements) + " elements, not " + describe(tensor));
}

void check(const Call& call, const ExpertDispatch& a) {
  require_rank(call, "x", *a.x, 2, 2);
  require_half(call, "x", *a.x);
  require_rank(call, "expertIds", *a.ids, 2, 2);
  require_dtype(call, "expertIds", *a.ids, c10::ScalarType::Int);
  const int64_t tokens = a.x->size(0), hidden = a.x->size(1), k = a.ids->size(1);
  if (a.ids->size(0) != tokens)
    call.refuse("expertIds", "has to have a row for each of " + std::to_string(tokens) + " tokens, not " +
                                 describe(*a.ids));
  if (a.quant_mode != 0 && a.quant_mode != 2)
    call.refuse("quantMode", "has to be 0 or 2 (dynamic), not " + std::to_string(a.quant_mode));
  if (a.counts_type != 0 && a.counts_type != 1)
    call.refuse("expertTokenNumsType", "has to be 0 or 1, not " + std::to_string(a.counts_type));
  if (a.smooth != nullptr) {
    if (a.quant_mode == 0) call.refuse("scales", "has to be left out where nothing is quantized");
    require_dtype(call, "scales", *a.smooth, c10::ScalarType::Float);
    require_rank(call, "scales", *a.smooth, 2, 2);
    if (a.smooth->size(0) < a.world.experts || a.smooth->size(1) != hidden)
      call.refuse("scales", "has to have a row of " + std::to_string(hidden) + " for each of " +
                                std::to_string(a.world.experts) + " experts, not " + describe(*a.smooth));
  }
  check_active(call, a.active, a.world, tokens, k);
  const int64_t room = most_rows(a.world, tokens, k);
  const auto type = a.quant_mode == 0 ? a.x->dtype : c10::ScalarType::Char;
  require_dtype(call, "expandXOut", *a.rows, type);
  require_rank(call, "expandXOut", *a.rows, 2, 2);
  require_contiguous(call, "expandXOut", *a.rows);
  if (a.rows->size(0) < room || a.rows->size(1) != hidden)
    call.refuse("expandXOut", "has to have at least " + std::to_string(room) + " rows of " +
                                  std::to_string(hidden) + ", not " + describe(*a.rows));
  if (a.quant_mode != 0) {
    require_dtype(call, "dynamicScalesOut", *a.scales, c10::ScalarType::Float);
    require_contiguous(call, "dynamicScalesOut", *a.scales);
    if (a.scales->numel() < room)
      call.refuse("dynamicScalesOut", "has to have a scale for each of " + std::to_string(room) +
                                          " rows, not " + describe(*a.scales));
  }
  require_noted(call, "assistInfoForCombineOut", *a.assist, room * kAssist);
  require_result(call, "expertTokenNumsOut", *a.counts, c10::ScalarType::Long, {a.world.experts_each()});
  require_noted(call, "epRecvCountsOut", *a.received, a.world.experts);
}

void check(const Call& call, const ExpertCombine& a) {
  require_rank(call, "expandX", *a.rows, 2, 2);
  require_half(call, "expandX", *a.rows);
  require_contiguous(call, "expandX", *a.rows);
  require_rank(call, "expertIds", *a.ids, 2, 2);
  require_dtype(call, "expertIds", *a.ids, c10::ScalarType::Int);
  const int64_t tokens = a.ids->size(0), k = a.ids->size(1), hidden = a.rows->size(1);
  const int64_t room = most_rows(a.world, tokens, k);
  if (a.rows->size(0) < room)
    call.refuse("expandX",
                "has to have at least " + std::to_string(room) + " rows, not " + describe(*a.rows));
  require_noted(call, "assistInfoForCombine", *a.assist, room * kAssist);
  require_noted(call, "epSendCounts", *a.received, a.world.experts);
  require_dtype(call, "expertScales", *a.weights, c10::ScalarType::Float);
  require_shape(call, "expertScales", *a.weights, {tokens, k});
  if (a.quant_mode != 0)
    call.refuse("commQuantMode", "has to be 0: sending int8 back is not implemented by the host runtime");
  if (a.shared != nullptr) {
    require_same_dtype(call, "sharedExpertX", *a.shared, "expandX", *a.rows);
    require_rank(call, "sharedExpertX", *a.shared, 2, 3);
    if (a.shared->numel() != tokens * hidden || a.shared->size(-1) != hidden)
      call.refuse("sharedExpertX", "has to have " + std::to_string(tokens) + " rows of " +
                                       std::to_string(hidden) + ", not " + describe(*a.shared));
  }
  check_active(call, a.active, a.world, tokens, k);
  require_same_dtype(call, "xOut", *a.out, "expandX", *a.rows);
  require_shape(call, "xOut", *a.out, {tokens, hidden});
}

ExpertExchange described(const ExpertWorld& w, bool back, aclDataType type, int64_t hidden, int64_t tokens) {
  return {back, type, static_cast<uint64_t>(hidden), static_cast<uint32_t>(w.experts),
          static_cast<uint64_t>(w.tokens == 0 ? tokens * w.ranks : w.tokens)};
}

}  // namespace

Work expert_dispatch(const Call& call, const ExpertDispatch& a) {
  require_rank(call, "x", *a.x, 2, 2);
  require_rank(call, "expertIds", *a.ids, 2, 2);
  const int64_t tokens = a.x->size(0), hidden = a.x->size(1);
  const auto group = check_world(call, a.world, tokens, a.ids->size(1), hidden, kDispatchHeader);
  check(call, a);
  const Dispatching task{a.world,
                         described(a.world, false, a.rows->acl_dtype, hidden, tokens),
                         group,
                         call.name(),
                         a.counts_type,
                         a.quant_mode,
                         a.rows->size(0),
                         view(*a.x),
                         view(*a.ids),
                         view_of(a.active),
                         view_of(a.smooth),
                         view(*a.rows),
                         view_of(a.scales),
                         view(*a.assist),
                         view(*a.counts),
                         view(*a.received)};
  return [task] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    task.run();
  };
}

Work expert_combine(const Call& call, const ExpertCombine& a) {
  require_rank(call, "expandX", *a.rows, 2, 2);
  require_rank(call, "expertIds", *a.ids, 2, 2);
  const int64_t tokens = a.ids->size(0), hidden = a.rows->size(1);
  const auto group = check_world(call, a.world, tokens, a.ids->size(1), hidden, kCombineHeader);
  check(call, a);
  const Combining task{a.world,
                       described(a.world, true, a.rows->acl_dtype, hidden, tokens),
                       group,
                       call.name(),
                       view(*a.rows),
                       view(*a.ids),
                       view(*a.assist),
                       view(*a.received),
                       view(*a.weights),
                       view_of(a.active),
                       view_of(a.shared),
                       view(*a.out)};
  return [task] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    task.run();
  };
}

}  // namespace aclnn::fused
