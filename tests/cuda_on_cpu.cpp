// csrc/box_parser.cu on a CPU: each thread of a block is a coroutine that gives way where a warp waits.
//
// The threads of a warp meet the same waits in the same order, so one turn of all of them is one wait of each.
#include <ucontext.h>

#include <functional>
#include <vector>

#define __CUDA_ARCH__ 900  // the header's own paths for a GPU
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

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
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    threads = std::vector<Thread>(size);
    for (Thread& thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, start, 0);
    }
    for (bool going = true; going;) {
      going = false;
      for (unsigned turn = 0; turn < size; ++turn) {
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

#define LAUNCH(kernel, blocks, threads, stream, ...) ((void)stream, launch(kernel, blocks, threads, __VA_ARGS__))
#include "../csrc/box_parser.cu"

extern "C" {
void run_last_thread_first(bool yes) { last_first = yes; }
void texts_on_cuda(const boxgrpo::Texts* texts, const boxgrpo::Rewards* rewards) {
  boxgrpo::score_on_cuda(*texts, *rewards, nullptr);
}
void tokens_on_cuda(const boxgrpo::Tokens* tokens, const boxgrpo::Rewards* rewards) {
  boxgrpo::score_on_cuda(*tokens, *rewards, nullptr);
}
void overlap_on_cuda(const boxgrpo::Overlaps* overlaps) { boxgrpo::overlap_on_cuda(*overlaps, nullptr); }
}
