// csrc/box_parser_cuda.cu on a CPU: each thread of a block is a coroutine that gives way where a warp waits.
//
// The threads of a warp wait at the same points in the same order, so one turn of all of them is one wait of each. An
// assertion that fails ends the launch, as on a GPU; failed_assertion() returns it.
#include <ucontext.h>

#include <functional>
#include <vector>

#define __CUDA_ARCH__ 900  // the header's own paths for a GPU
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define __assert_fail emulated_assert_fail  // what <cassert> calls

namespace {

struct Index {
  unsigned x;
} threadIdx, blockIdx, blockDim;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool ended = false;
};

std::vector<Thread> threads;
ucontext_t scheduler;
std::function<void()> body;
bool last_first = false;  // the order of the threads between two waits
const char* failed = nullptr;  // an assertion
long slots[1024];  // what each thread shows to its warp

void wait() { swapcontext(&threads[threadIdx.x].context, &scheduler); }

void start() {
  body();
  threads[threadIdx.x].ended = true;
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned size, const Arguments&... arguments) {
  blockDim.x = size;
  body = [&] { kernel(arguments...); };
  failed = nullptr;
  for (blockIdx.x = 0; blockIdx.x < blocks && !failed; ++blockIdx.x) {
    threads = std::vector<Thread>(size);
    for (Thread& thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, start, 0);
    }
    for (bool going = true; going && !failed;) {
      going = false;
      for (unsigned turn = 0; turn < size && !failed; ++turn) {
        threadIdx.x = last_first ? size - 1 - turn : turn;
        if (threads[threadIdx.x].ended) continue;
        going = true;
        swapcontext(&scheduler, &threads[threadIdx.x].context);
      }
    }
  }
}

template <typename Value>
Value exchanged(Value mine, unsigned lane) {
  slots[threadIdx.x] = mine;
  wait();
  const Value theirs = slots[threadIdx.x / 32 * 32 + lane];
  wait();
  return theirs;
}

void __syncwarp() { wait(); }

long __shfl_up_sync(unsigned, long mine, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  return exchanged(mine, lane < step ? lane : lane - step);
}

long __shfl_sync(unsigned, long mine, unsigned lane) { return exchanged(mine, lane); }

unsigned __ballot_sync(unsigned, bool mine) {
  unsigned votes = 0;
  slots[threadIdx.x] = mine;
  wait();
  for (unsigned lane = 0; lane < 32; ++lane) votes |= unsigned(slots[threadIdx.x / 32 * 32 + lane]) << lane;
  wait();
  return votes;
}

int __ffs(unsigned word) { return __builtin_ffs(word); }
int __ffsll(unsigned long word) { return __builtin_ffsll(word); }

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

}  // namespace

extern "C" [[noreturn]] void emulated_assert_fail(const char* assertion, const char*, unsigned, const char*) noexcept {
  failed = assertion;
  setcontext(&scheduler);
  __builtin_unreachable();
}

#define LAUNCH(kernel, blocks, threads, stream, ...) ((void)stream, launch(kernel, blocks, threads, __VA_ARGS__))
#include "box_parser_cuda.cu"

extern "C" {
const char* failed_assertion() { return failed; }
void run_last_thread_first(bool yes) { last_first = yes; }
void texts_on_cuda(const boxgrpo::Texts* texts, const boxgrpo::Rewards* rewards) {
  boxgrpo::score_on_cuda(*texts, *rewards, nullptr);
}
void tokens_on_cuda(const boxgrpo::Tokens* tokens, const boxgrpo::Rewards* rewards) {
  boxgrpo::score_on_cuda(*tokens, *rewards, nullptr);
}
void overlap_on_cuda(const boxgrpo::Overlaps* overlaps) { boxgrpo::overlap_on_cuda(*overlaps, nullptr); }
}
