// CUDA on the CPU: tensors whose device is cuda:0, in the CPU's memory, computed by the CPU's kernels.
//
// torch's build for CPUs has no kernel for CUDA tensors. Here a fallback gives each operation CPU tensors over the same
// memory, and refuses a mix of devices as CUDA's kernels do. Numbers are real, so everything that reads them works.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Storage;
using c10::StorageImpl;
using torch::jit::Stack;

const c10::Device CUDA(c10::kCUDA, 0);
std::atomic<int64_t> allocated_bytes{0}, peak_bytes{0};
std::mutex freed_mutex;
std::vector<int64_t> freed_addresses;  // since they were last asked for

// Memory of a CUDA tensor: that of a CPU storage, counted.
struct DeviceMemory {
  explicit DeviceMemory(Storage owner) : storage(std::move(owner)), size(storage.nbytes()) {
    const int64_t total = allocated_bytes += size;
    int64_t peak = peak_bytes;
    while (total > peak && !peak_bytes.compare_exchange_weak(peak, total)) {
    }
  }
  ~DeviceMemory() {
    allocated_bytes -= size;
    std::lock_guard<std::mutex> lock(freed_mutex);
    freed_addresses.push_back(reinterpret_cast<int64_t>(storage.data()));
  }
  Storage storage;
  int64_t size;
};

void free_device_memory(void* memory) {
  delete static_cast<DeviceMemory*>(memory);
}

void free_alias(void* storage) {
  delete static_cast<Storage*>(storage);
}

void free_pinned(void* storage) {
  delete static_cast<Storage*>(storage);
}

Tensor make_tensor_like(const Tensor& like, Storage storage, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  return tensor;
}

Storage make_storage(c10::DataPtr data, size_t bytes) {
  return Storage(Storage::use_byte_size_t(), bytes, std::move(data), c10::GetCPUAllocator(), /*resizable=*/true);
}

c10::DataPtr device_pointer(const Storage& cpu_storage) {
  void* data = const_cast<void*>(cpu_storage.data());
  return c10::DataPtr(data, new DeviceMemory(cpu_storage), free_device_memory, CUDA);
}

// The arguments of one operation as CPU tensors.
class Aliases {
 public:
  Tensor to_cpu(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      return tensor;
    }
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(key);
    if (found == storages_.end()) {
      const Storage& original = tensor.storage();
      void* data = const_cast<void*>(original.data());
      auto alias = make_storage(
          c10::DataPtr(data, new Storage(original), free_alias, c10::Device(c10::kCPU)), original.nbytes());
      found = storages_.emplace(key, std::make_pair(original, alias)).first;
      originals_.emplace(alias.unsafeGetStorageImpl(), original);
    }
    auto alias = make_tensor_like(tensor, found->second.second, c10::DispatchKey::CPU);
    tensors_.emplace_back(alias, tensor);
    return alias;
  }

  // An output on the device: an argument itself, a view of one, or new memory.
  Tensor to_cuda(const Tensor& output) {
    if (!output.defined() || output.is_cuda()) {
      return output;
    }
    for (const auto& [alias, original] : tensors_) {
      if (alias.is_same(output)) {
        return original;
      }
    }
    auto* impl = output.storage().unsafeGetStorageImpl();
    if (auto found = originals_.find(impl); found != originals_.end()) {
      return make_tensor_like(output, found->second, c10::DispatchKey::CUDA);
    }
    auto storage = make_storage(device_pointer(output.storage()), output.storage().nbytes());
    originals_.emplace(impl, storage);
    return make_tensor_like(output, storage, c10::DispatchKey::CUDA);
  }

  // Gives the arguments the sizes and the memory that the operation gave their aliases, as `out=` and resize_ do.
  void write_back() {
    for (const auto& [key, pair] : storages_) {
      const auto& [original, alias] = pair;
      if (alias.data() != original.data()) {
        auto* impl = original.unsafeGetStorageImpl();
        Storage grown = alias;
        impl->set_data_ptr_noswap(device_pointer(grown));
        impl->set_nbytes(alias.nbytes());
      }
    }
    for (const auto& [alias, original] : tensors_) {
      if (alias.sizes() != original.sizes() || alias.strides() != original.strides()) {
        auto* impl = original.unsafeGetTensorImpl();
        impl->set_storage_offset(alias.storage_offset());
        impl->set_sizes_and_strides(alias.sizes(), alias.strides());
      }
    }
  }

 private:
  std::unordered_map<StorageImpl*, std::pair<Storage, Storage>> storages_;  // original -> (original, alias)
  std::unordered_map<StorageImpl*, Storage> originals_;  // CPU storage -> storage on the device
  std::vector<std::pair<Tensor, Tensor>> tensors_;  // (alias, original)
};

void check_device(const c10::OperatorHandle& op, const Tensor& tensor) {
  TORCH_CHECK(
      !tensor.defined() || tensor.is_cuda() || tensor.dim() == 0,
      "Expected all tensors to be on the same device, but ", op.operator_name(), " got a tensor of shape ",
      tensor.sizes(), " on cpu beside tensors on cuda:0");
}

c10::IValue argument_to_cpu(const c10::OperatorHandle& op, const c10::IValue& value, Aliases& aliases) {
  if (value.isTensor()) {
    check_device(op, value.toTensor());
    return aliases.to_cpu(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<Tensor> tensors;
    for (const Tensor& tensor : value.toTensorVector()) {
      check_device(op, tensor);
      tensors.push_back(aliases.to_cpu(tensor));
    }
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> tensors;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
      if (tensor.has_value()) {
        check_device(op, *tensor);
      }
      tensors.push_back(tensor.has_value() ? std::optional<Tensor>(aliases.to_cpu(*tensor)) : std::nullopt);
    }
    return tensors;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) {
    return c10::Device(c10::kCPU);
  }
  return value;
}

c10::IValue output_to_cuda(const c10::IValue& value, Aliases& aliases) {
  if (value.isTensor()) {
    return aliases.to_cuda(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<Tensor> tensors;
    for (const Tensor& tensor : value.toTensorVector()) {
      tensors.push_back(aliases.to_cuda(tensor));
    }
    return tensors;
  }
  return value;
}

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  Aliases aliases;
  const auto num_arguments = op.schema().arguments().size();
  for (auto& value : torch::jit::last(*stack, num_arguments)) {
    const_cast<c10::IValue&>(value) = argument_to_cpu(op, value, aliases);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  aliases.write_back();
  for (auto& value : torch::jit::last(*stack, op.schema().returns().size())) {
    const_cast<c10::IValue&>(value) = output_to_cuda(value, aliases);
  }
}

Tensor wrap_new(const Tensor& cpu) {
  Aliases aliases;
  return aliases.to_cuda(cpu);
}

Tensor empty_memory_format(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<at::Device> device,
    std::optional<bool> pin_memory,
    std::optional<at::MemoryFormat> memory_format) {
  TORCH_CHECK(!pin_memory.value_or(false), "only CPU tensors can be pinned");
  return wrap_new(at::empty(size, dtype, layout, c10::Device(c10::kCPU), std::nullopt, memory_format));
}

Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<at::Device> device,
    std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "only CPU tensors can be pinned");
  return wrap_new(at::empty_strided(size, stride, dtype, layout, c10::Device(c10::kCPU), std::nullopt));
}

// Between any two devices, with conversion and broadcasting.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  Aliases aliases;
  aliases.to_cpu(self).copy_(aliases.to_cpu(source), false);
  return self;
}

Tensor pinned_empty(at::IntArrayRef size, at::ScalarType dtype) {
  Storage memory = at::empty(size, at::TensorOptions().dtype(dtype)).storage();
  void* data = const_cast<void*>(memory.data());
  auto pinned = make_storage(
      c10::DataPtr(data, new Storage(memory), free_pinned, c10::Device(c10::kCPU)), memory.nbytes());
  return at::empty({0}, at::TensorOptions().dtype(dtype)).set_(pinned, 0, size);
}

bool is_pinned(const Tensor& tensor) {
  return tensor.defined() && tensor.has_storage() && tensor.storage().data_ptr().get_deleter() == free_pinned;
}

bool is_channels_last(const Tensor& tensor) {
  return tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
      tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast3d;
}

// cuDNN's output is channels last in memory if the input or the weight is, whatever the shape of the other one says.
Tensor convolve(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool transposed,
    at::IntArrayRef output_padding,
    int64_t groups) {
  const bool has_bias = bias.has_value() && bias->defined();
  TORCH_CHECK(
      input.is_cuda() && weight.is_cuda() && (!has_bias || bias->is_cuda()),
      "Expected all tensors to be on the same device, but convolution got an input on ", input.device(),
      " and a weight on ", weight.device());
  TORCH_CHECK(
      input.scalar_type() == weight.scalar_type() && (!has_bias || bias->scalar_type() == input.scalar_type()),
      "Input type (", input.scalar_type(), ") and weight type (", weight.scalar_type(), ") should be the same");
  Aliases aliases;
  auto cpu_bias = has_bias ? std::optional<Tensor>(aliases.to_cpu(*bias)) : std::nullopt;
  auto output = at::convolution(
      aliases.to_cpu(input), aliases.to_cpu(weight), cpu_bias, stride, padding, dilation, transposed, output_padding,
      groups);
  auto format = at::MemoryFormat::Contiguous;
  if (is_channels_last(input) || is_channels_last(weight)) {
    format = input.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  }
  return aliases.to_cuda(output.contiguous(format));
}

// What torch.convolution ends in, and what kadr calls in float32 to say that it wants no TF32.
Tensor convolve_with_flags(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool transposed,
    at::IntArrayRef output_padding,
    int64_t groups,
    bool benchmark,
    bool deterministic,
    bool cudnn_enabled,
    bool allow_tf32) {
  return convolve(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
}

int64_t memory_allocated() {
  return allocated_bytes;
}

int64_t max_memory_allocated() {
  return peak_bytes;
}

std::vector<int64_t> take_freed() {
  std::lock_guard<std::mutex> lock(freed_mutex);
  return std::exchange(freed_addresses, {});
}

void reset_peak() {
  peak_bytes = allocated_bytes.load();
}

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>);

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty_memory_format);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("convolution", convolve);
  m.impl("_convolution", convolve_with_flags);
}

TORCH_LIBRARY(fake_cuda, m) {
  m.def("pinned_empty(int[] size, ScalarType dtype) -> Tensor", pinned_empty);
  m.def("is_pinned(Tensor self) -> bool", is_pinned);
  m.def("memory_allocated() -> int", memory_allocated);
  m.def("max_memory_allocated() -> int", max_memory_allocated);
  m.def("reset_peak() -> ()", reset_peak);
  m.def("take_freed() -> int[]", take_freed);
}

}  // namespace
