// torch.ops.boxgrpo.*: the schemas, and their implementations on a CPU and, where it was built, on CUDA. The fakes are
// beside the public functions, in kernels/.
#include <ATen/Functions.h>
#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <tuple>

#include "launch.h"

namespace boxgrpo {
namespace {

using at::Tensor;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

void check(const char* name, const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape, at::Device device) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype && tensor.sizes() == shape, name, " is ", tensor.scalar_type(), " ",
                    tensor.sizes(), "; it must be ", dtype, " ", shape, ".");
  TORCH_CHECK_VALUE(tensor.device() == device, name, " is on ", tensor.device(), " and gold on ", device,
                    "; they must be on one device. Move it.");
}

template <typename Input>
Results score(const Input& input, const Tensor& gold, const Tensor& formats) {
  const int64_t n = gold.size(0);
  const Tensor accuracy = at::empty({n}, gold.options()), format = at::empty({n}, gold.options());
  const Tensor boxes = at::empty({n, 4}, gold.options());
  const Tensor found = at::empty({n}, gold.options().dtype(at::kBool));
  const Tensor spans = at::empty({n, 4}, gold.options().dtype(at::kInt));
  const Tensor gold_rows = gold.contiguous(), format_rows = formats.contiguous();
  const Rewards rewards{gold_rows.const_data_ptr<float>(),
                        format_rows.const_data_ptr<uint8_t>(),
                        accuracy.mutable_data_ptr<float>(),
                        format.mutable_data_ptr<float>(),
                        boxes.mutable_data_ptr<float>(),
                        found.mutable_data_ptr<bool>(),
                        spans.mutable_data_ptr<int32_t>(),
                        n};
#ifdef BOXGRPO_CUDA
  if (gold.is_cuda()) {
    const c10::DeviceGuard guard(gold.device());
    const auto stream = c10::impl::VirtualGuardImpl(at::kCUDA).getStream(gold.device());
    const char* wrong = score_on_cuda(input, rewards, stream.native_handle());
    TORCH_CHECK(!wrong, "grounding_rewards did not start: ", wrong);
    return {accuracy, format, boxes, found, spans};
  }
#endif
  score_on_cpu(input, rewards);
  return {accuracy, format, boxes, found, spans};
}

Results grounding_rewards(const Tensor& text, const Tensor& offsets, const Tensor& gold, const Tensor& formats) {
  const auto device = gold.device();
  const int64_t n = gold.dim() ? gold.size(0) : 0;
  check("gold", gold, at::kFloat, {n, 4}, device);
  check("text", text, at::kByte, {text.numel()}, device);
  check("offsets", offsets, at::kLong, {n + 1}, device);
  check("formats", formats, at::kByte, {n}, device);
  const Tensor bytes = text.contiguous(), bounds = offsets.contiguous();
  return score(Texts{bytes.const_data_ptr<uint8_t>(), bounds.const_data_ptr<int64_t>(), bytes.numel()}, gold, formats);
}

Results grounding_rewards_from_ids(const Tensor& ids, const Tensor& lengths, const Tensor& data, const Tensor& entries,
                                   const Tensor& gold, const Tensor& formats) {
  const auto device = gold.device();
  const int64_t n = gold.dim() ? gold.size(0) : 0, width = ids.dim() == 2 ? ids.size(1) : 0;
  const bool wide = lengths.scalar_type() == at::kLong;
  check("gold", gold, at::kFloat, {n, 4}, device);
  check("ids", ids, at::kLong, {n, width}, device);
  check("lengths", lengths, wide ? at::kLong : at::kInt, {n}, device);
  check("data", data, at::kByte, {data.numel()}, device);
  check("entries", entries, at::kLong, {entries.numel()}, device);
  check("formats", formats, at::kByte, {n}, device);
  const Tensor rows = ids.contiguous(), counts = lengths.contiguous();
  const Tensor bytes = data.contiguous(), packed = entries.contiguous();
  const Tokens tokens{rows.const_data_ptr<int64_t>(),
                      width,
                      counts.const_data_ptr(),
                      wide,
                      bytes.const_data_ptr<uint8_t>(),
                      packed.const_data_ptr<int64_t>(),
                      bytes.numel(),
                      packed.numel()};
  return score(tokens, gold, formats);
}

Tensor box_iou(const Tensor& a, const Tensor& b, bool pairwise, bool generalized) {
  const int64_t n = a.dim() ? a.size(0) : 0, m = pairwise && b.dim() ? b.size(0) : n;
  check("a", a, at::kFloat, {n, 4}, a.device());
  check("b", b, at::kFloat, {m, 4}, a.device());
  const Tensor out = pairwise ? at::empty({n, m}, a.options()) : at::empty({n}, a.options());
  const Tensor rows = a.contiguous(), columns = b.contiguous();
  const Overlaps overlaps{rows.const_data_ptr<float>(), columns.const_data_ptr<float>(),
                          out.mutable_data_ptr<float>(), n, m, pairwise, generalized};
#ifdef BOXGRPO_CUDA
  if (a.is_cuda()) {
    const c10::DeviceGuard guard(a.device());
    const auto stream = c10::impl::VirtualGuardImpl(at::kCUDA).getStream(a.device());
    const char* wrong = overlap_on_cuda(overlaps, stream.native_handle());
    TORCH_CHECK(!wrong, "box_iou did not start: ", wrong);
    return out;
  }
#endif
  overlap_on_cpu(overlaps);
  return out;
}

#define BOXGRPO_RESULTS "(Tensor accuracy, Tensor format, Tensor boxes, Tensor found, Tensor spans)"

TORCH_LIBRARY(boxgrpo, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("grounding_rewards(Tensor text, Tensor offsets, Tensor gold, Tensor formats) -> " BOXGRPO_RESULTS, tags);
  m.def(
      "grounding_rewards_from_ids(Tensor ids, Tensor lengths, Tensor data, Tensor entries, Tensor gold, "
      "Tensor formats) -> " BOXGRPO_RESULTS,
      tags);
  m.def("box_iou(Tensor a, Tensor b, bool pairwise, bool generalized) -> Tensor", tags);
}

void implement(torch::Library& m) {
  m.impl("grounding_rewards", grounding_rewards);
  m.impl("grounding_rewards_from_ids", grounding_rewards_from_ids);
  m.impl("box_iou", box_iou);
}

TORCH_LIBRARY_IMPL(boxgrpo, CPU, m) { implement(m); }

#ifdef BOXGRPO_CUDA
TORCH_LIBRARY_IMPL(boxgrpo, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace boxgrpo

// Importing the module loads this library, and loading it registers the operators.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
