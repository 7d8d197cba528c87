// Arguments of an operator call in the form of the kernels: checked sizes, types, strides and pointers.
//
// Python has checked the arguments already; the checks here prevent out-of-bounds reads.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "deform_attn.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::vector<int64_t> Sizes;
typedef std::vector<bool> Needs;

int32_t dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return kFloat64;
    case ScalarType::Float: return kFloat32;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: STD_TORCH_CHECK(false, "deform_attn takes float64, float32, float16 and bfloat16 values");
  }
}

Tensor as(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

Tensor contiguous_as(const Tensor& tensor, ScalarType type) { return torch::stable::contiguous(as(tensor, type)); }

// Returns a copy of a view whose address is not a multiple of 16 bytes, because the CUDA kernels read several numbers at
// once, and a GPU stops at such an address.
Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

void check_sizes(const Tensor& tensor, const Sizes& sizes, const char* name) {
  const auto found = tensor.sizes();
  STD_TORCH_CHECK(
      found.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), found.begin()), "deform_attn: ", name,
      " does not have the shape that value and shapes require");
}

// Arguments of the kernels, and the tensors that keep their memory alive.
struct Call {
  Tensor value;
  std::vector<Tensor> queries;  // plain: locations, weights; fused: reference points, offsets, logits
  DeformAttnProblem problem{};
  DeformAttnInputs inputs{};
  ScalarType sum_type, query_type;

  bool fused() const { return queries.size() == 3; }
  int64_t rows() const { return problem.batch * problem.queries; }

  // cuda_kernels: whether the kernels are those of deform_attn.cu, which support float16 values, and weights, offsets and
  // logits in the dtype of value, and need aligned addresses.
  Call(const Tensor& given, const Sizes& shapes, const std::vector<Tensor>& tensors, bool cuda_kernels)
      : value(given), queries(tensors) {
    sum_type = given.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    query_type = sum_type;
    if (cuda_kernels) {
      const ScalarType type = given.scalar_type();
      bool same = true;
      for (size_t i = 1; i < queries.size(); ++i) same = same && queries[i].scalar_type() == type;
      if (same) query_type = type;
    } else if (given.scalar_type() == ScalarType::Half) {
      value = as(given, ScalarType::Float);
    }
    queries[0] = as(queries[0], sum_type);
    if (!fused()) queries[0] = torch::stable::contiguous(queries[0]);
    for (size_t i = 1; i < queries.size(); ++i) queries[i] = contiguous_as(queries[i], query_type);
    if (cuda_kernels) {
      value = aligned(value);
      for (Tensor& tensor : queries) tensor = aligned(tensor);
    }
    describe_value(shapes);
    describe_queries();
  }

  void describe_value(const Sizes& shapes) {
    STD_TORCH_CHECK(value.dim() == 4, "deform_attn: value must be [B, S, H, D]");
    STD_TORCH_CHECK(
        shapes.size() % 2 == 0 && shapes.size() <= 2 * size_t(kDeformAttnMaxLevels), "deform_attn: shapes must be ",
        "(height, width) of at most ", int(kDeformAttnMaxLevels), " levels");
    if (value.stride(3) != 1 && value.size(3) > 1) value = torch::stable::contiguous(value);
    problem.batch = value.size(0), problem.tokens = value.size(1);
    problem.heads = int32_t(value.size(2)), problem.channels = int32_t(value.size(3));
    problem.value_dtype = dtype_of(value.scalar_type()), problem.query_dtype = dtype_of(query_type);
    problem.value_batch_stride = value.stride(0);
    problem.value_token_stride = value.stride(1);
    problem.value_head_stride = value.stride(2);
    problem.levels = int32_t(shapes.size() / 2);
    int64_t start = 0;
    for (int32_t l = 0; l < problem.levels; ++l) {
      const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
      STD_TORCH_CHECK(height >= 0 && width >= 0, "deform_attn: shapes must not be negative");
      problem.level[l] = {int32_t(height), int32_t(width), start};
      start += height * width;
    }
    STD_TORCH_CHECK(
        start == problem.tokens && start < (int64_t(1) << 31), "deform_attn: value has ", problem.tokens,
        " tokens, but the levels have ", start);
    inputs.value = value.const_data_ptr();
  }

  void describe_queries() {
    const Tensor& points = queries[fused() ? 1 : 0];
    STD_TORCH_CHECK(points.dim() == 6, "deform_attn: locations and offsets must be [B, Q, H, L, P, 2]");
    problem.queries = points.size(1), problem.points = int32_t(points.size(4));
    const int64_t B = problem.batch, Q = problem.queries, H = problem.heads, L = problem.levels, P = problem.points;
    check_sizes(points, {B, Q, H, L, P, 2}, fused() ? "offsets" : "locations");
    if (!fused()) {
      check_sizes(queries[1], {B, Q, H, L, P}, "weights");
      inputs.locations = queries[0].const_data_ptr(), inputs.weights = queries[1].const_data_ptr();
      return;
    }
    check_sizes(queries[2], {B, Q, H, L * P}, "logits");
    Tensor& reference = queries[0];
    STD_TORCH_CHECK(reference.dim() == 4, "deform_attn: reference_points must be [B, Q, L or 1, 2 or 4]");
    if (reference.stride(3) != 1) reference = torch::stable::contiguous(reference);
    const int64_t levels = reference.size(2), size = reference.size(3);
    STD_TORCH_CHECK((levels == 1 || levels == L) && (size == 2 || size == 4),
                    "deform_attn: reference_points must be [B, Q, L or 1, 2 or 4]");
    check_sizes(reference, {B, Q, levels, size}, "reference_points");
    problem.reference_levels = int32_t(levels), problem.reference_size = int32_t(size);
    problem.reference_batch_stride = reference.stride(0);
    problem.reference_query_stride = reference.stride(1);
    problem.reference_level_stride = reference.stride(2);
    inputs.reference = reference.const_data_ptr();
    inputs.offsets = queries[1].const_data_ptr(), inputs.logits = queries[2].const_data_ptr();
  }

  Sizes output_sizes() const { return {problem.batch, problem.queries, int64_t(problem.heads) * problem.channels}; }
};

Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// Gradients of value and queries in the kernels' types; gradients that are not needed stay empty.
struct Gradients {
  std::vector<Tensor> tensors;
  DeformAttnGradients pointers{};

  Gradients(const Call& call, const Needs& needs) {
    std::vector<void*> memory;
    for (size_t i = 0; i < needs.size(); ++i) {
      const Tensor& like = i == 0 ? call.value : call.queries[i - 1];
      tensors.push_back(torch::stable::new_empty(like, needs[i] ? sizes_of(like) : Sizes{0}));
      memory.push_back(needs[i] ? tensors[i].mutable_data_ptr() : nullptr);
    }
    pointers.value = memory[0];
    if (call.fused())
      pointers.reference = memory[1], pointers.offsets = memory[2], pointers.logits = memory[3];
    else
      pointers.locations = memory[1], pointers.weights = memory[2];
  }
};

}  // namespace
