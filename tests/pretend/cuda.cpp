// A pretend CUDA device for PyTorch's CPU build: tensors on "cuda:0" whose bytes lie in host memory.
//
// C++ registers what Python cannot: the device guard, the hooks, the pinned allocator, and tensors with CUDA's
// dispatch key. cuda.py decides what each operation does.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <mutex>
#include <set>

namespace {
using c10::Device;
using c10::DeviceType;

std::mutex pinned_lock;
std::set<const void*>& pinned() {
  static auto* addresses = new std::set<const void*>;
  return *addresses;
}

// Host memory that `is_pinned` knows.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto address = c10::GetCPUAllocator()->raw_allocate(bytes);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned().insert(address);
    return {address, address, &free_pinned, Device(DeviceType::CPU)};
  }
  static void free_pinned(void* address) {
    {
      std::lock_guard<std::mutex> guard(pinned_lock);
      pinned().erase(address);
    }
    c10::GetCPUAllocator()->raw_deallocate(address);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t count) const override { memcpy(to, from, count); }
};
PinnedAllocator pinned_allocator;

// One device with one stream, on which everything has happened already.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() { return {DeviceType::CUDA, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  Device exchangeDevice(Device) const override { return device(); }
  Device getDevice() const override { return device(); }
  c10::Stream getStream(Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

void release(void* storage) { delete static_cast<c10::Storage*>(storage); }

// The same bytes under another device's name.
at::Tensor relabel(const at::Tensor& x, Device device, c10::DispatchKey key) {
  auto* owner = new c10::Storage(x.storage());
  c10::DataPtr data(owner->mutable_data(), owner, &release, device);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data), nullptr, false);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), x.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return result;
}
at::Tensor to_cuda(const at::Tensor& x) { return relabel(x, Guard::device(), c10::DispatchKey::CUDA); }
at::Tensor to_cpu(const at::Tensor& x) { return relabel(x, Device(DeviceType::CPU), c10::DispatchKey::CPU); }

// Give `x`, an `out` argument that was too small, the contents of `result`.
void assign(const at::Tensor& x, const at::Tensor& result) {
  auto relabelled = to_cuda(result);
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(relabelled.storage());
  x.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
}
} // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void* address) const override {
    std::lock_guard<std::mutex> guard(pinned_lock);
    return pinned().count(address) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = at::detail::createCPUGenerator(0);
    return generator;
  }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(0); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at

TORCH_LIBRARY(pretend, library) {
  library.def("to_cuda(Tensor x) -> Tensor");
  library.def("to_cpu(Tensor x) -> Tensor");
  library.def("assign(Tensor(a!) x, Tensor result) -> ()");
}
TORCH_LIBRARY_IMPL(pretend, CPU, library) { library.impl("to_cuda", to_cuda); }
TORCH_LIBRARY_IMPL(pretend, CUDA, library) {
  library.impl("to_cpu", to_cpu);
  library.impl("assign", assign);
}
// Views share the storage and need no kernel.
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("as_strided", [](const at::Tensor& x, at::IntArrayRef size, at::IntArrayRef stride,
                                std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(x, size, stride, offset);
  });
  library.impl("view", [](const at::Tensor& x, at::IntArrayRef size) { return at::native::view(x, size); });
  library.impl("_reshape_alias", [](const at::Tensor& x, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::_reshape_alias(x, size, stride);
  });
}
