// The CUDA launchers: a warp to a completion. Its lanes gather the bytes into shared memory, and one of them parses.
//
// No torch header, so that nvcc compiles this file without a CUDA build of torch. A test defines LAUNCH to run the
// kernels on a CPU.
#include <cassert>

#include "launch.h"

#ifndef LAUNCH
#define LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace boxgrpo {
namespace {

constexpr int kWarps = 4;          // completions of a block
constexpr int kLaneTokens = 8;     // tokens that a lane gathers at a time
constexpr int64_t kTile = 2048;    // bytes that are parsed at a time; most completions of 256 tokens
constexpr int64_t kThreads = 256;  // of a block without shared memory
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ uint8_t checked_format(const Rewards& rewards, int64_t row) {
  const uint8_t format = rewards.formats[row];
  assert(format < kFormats && "answer_format holds a code outside ANSWER_FORMATS");
  return format;
}

__global__ void __launch_bounds__(32 * kWarps) score_texts(Texts texts, Rewards rewards) {
  alignas(8) __shared__ uint8_t tiles[kWarps][kTile];
  const int lane = threadIdx.x % 32;
  uint8_t* tile = tiles[threadIdx.x / 32];
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= rewards.n) return;
  const int64_t start = texts.offsets[row], end = texts.offsets[row + 1];
  assert(0 <= start && start <= end && end <= texts.size && "offsets fall, or leave the text");
  assert(end - start <= INT32_MAX && "a completion has 2 GiB; spans are counted in int32");
  BoxParser parser(checked_format(rewards, row));
  for (int64_t from = start; from < end; from += kTile) {
    const int64_t size = end - from < kTile ? end - from : kTile;
    for (int64_t k = lane; k < size; k += 32) tile[k] = texts.bytes[from + k];
    __syncwarp();
    if (lane == 0) parser.feed(tile, tile + size);
    __syncwarp();
  }
  if (lane == 0) rewards.write(row, parser);
}

__global__ void __launch_bounds__(32 * kWarps) score_tokens(Tokens tokens, Rewards rewards) {
  alignas(8) __shared__ uint8_t tiles[kWarps][kTile];
  const int lane = threadIdx.x % 32;
  uint8_t* tile = tiles[threadIdx.x / 32];
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= rewards.n) return;
  const uint8_t format = checked_format(rewards, row);
  const int64_t* ids = tokens.ids + row * tokens.width;
  const int64_t length = tokens.length(row);
  BoxParser parser(format);
  unsigned ended = 0;  // lanes that read the completion's end
  for (int64_t from = 0; from < length && !ended; from += 32 * kLaneTokens) {
    int64_t starts[kLaneTokens], sizes[kLaneTokens], mine = 0;
    bool met_eos = false, is_foreign = false, is_outside = false;
#pragma unroll
    for (int k = 0; k < kLaneTokens; ++k) {
      const int64_t t = from + lane * kLaneTokens + k;
      starts[k] = sizes[k] = 0;
      if (t >= length) continue;
      const int64_t id = ids[t];
      const bool is_known = 0 <= id && id < tokens.vocabulary;
      const Entry entry(is_known ? tokens.entries[id] : 0);  // 0: no bytes, no role
      met_eos |= entry.role() == Entry::kEos;
      if (met_eos || entry.is_silent(format)) continue;
      is_foreign |= !is_known;
      is_outside |= entry.start() + entry.size() > tokens.size;
      starts[k] = entry.start();
      sizes[k] = entry.size();
      mine += entry.size();
    }
    ended = __ballot_sync(kAllLanes, met_eos);
    if (ended && lane > __ffs(ended) - 1) {  // after the completion's end, where ids may be anything
      mine = 0;
      is_foreign = is_outside = false;
    }
    assert(!is_foreign && "ids holds what the table does not cover");
    assert(!is_outside && "a token of the table leaves its bytes");
    int64_t behind = mine;  // bytes up to and with this lane's
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, behind, step);
      if (lane >= step) behind += before;
    }
    const int64_t total = __shfl_sync(kAllLanes, behind, 31);
    for (int64_t window = 0; window < total; window += kTile) {
      int64_t at = behind - mine - window;  // of this lane's next token in the tile
      if (mine) {
#pragma unroll
        for (int k = 0; k < kLaneTokens; ++k) {
          for (int64_t b = at < 0 ? -at : 0; b < sizes[k] && at + b < kTile; ++b)
            tile[at + b] = tokens.bytes[starts[k] + b];
          at += sizes[k];
        }
      }
      __syncwarp();
      if (lane == 0) parser.feed(tile, tile + (total - window < kTile ? total - window : kTile));
      __syncwarp();
    }
  }
  if (lane == 0) rewards.write(row, parser);
}

__global__ void overlap(Overlaps overlaps) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < overlaps.size()) overlaps.write(i);
}

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

const char* status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* score_on_cuda(const Texts& texts, const Rewards& rewards, void* stream) {
  if (rewards.n == 0) return nullptr;
  LAUNCH(score_texts, blocks(rewards.n, kWarps), 32 * kWarps, stream, texts, rewards);
  return status();
}

const char* score_on_cuda(const Tokens& tokens, const Rewards& rewards, void* stream) {
  if (rewards.n == 0) return nullptr;
  LAUNCH(score_tokens, blocks(rewards.n, kWarps), 32 * kWarps, stream, tokens, rewards);
  return status();
}

const char* overlap_on_cuda(const Overlaps& overlaps, void* stream) {
  if (overlaps.size() == 0) return nullptr;
  LAUNCH(overlap, blocks(overlaps.size(), kThreads), kThreads, stream, overlaps);
  return status();
}

}  // namespace boxgrpo
