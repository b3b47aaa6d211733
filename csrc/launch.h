// What the binding passes to the launchers: raw pointers, so that nvcc compiles box_parser_cuda.cu without torch.
#pragma once

#include "box_parser.h"

namespace boxgrpo {

struct Texts {
  const uint8_t* bytes;    // (size)
  const int64_t* offsets;  // (n+1)
  int64_t size;
};

// A token, as kernels/vocabulary.py packs it: where its bytes start, how many there are, and its role.
class Entry {
 public:
  enum Role { kPlain, kBracket, kText, kEos, kMark };  // plain: without '<', '(' and '['; bracket: without '<'

  BOXGRPO_HD explicit Entry(int64_t packed) : packed_(static_cast<uint64_t>(packed)) {}
  BOXGRPO_HD int64_t start() const { return static_cast<int64_t>(packed_ >> 25); }
  BOXGRPO_HD int64_t size() const { return static_cast<int64_t>(packed_ >> 3 & 0x3fffff); }
  BOXGRPO_HD Role role() const { return static_cast<Role>(packed_ & 7); }
  BOXGRPO_HD bool may_pass(const BoxParser& parser) const {
    return role() == kPlain || (role() == kBracket && !parser.is_searching());
  }
  BOXGRPO_HD bool is_silent(uint8_t format) const { return role() == kMark && format != kMarked; }

 private:
  uint64_t packed_;
};

struct Tokens {
  const int64_t* ids;  // (n, width)
  int64_t width;
  const void* lengths;  // (n) int64, or int32 where wide_lengths is false
  bool wide_lengths;
  const uint8_t* bytes;    // (size), the vocabulary's
  const int64_t* entries;  // (vocabulary)
  int64_t size, vocabulary;

  BOXGRPO_HD int64_t length(int64_t row) const {
    const int64_t length =
        wide_lengths ? static_cast<const int64_t*>(lengths)[row] : static_cast<const int32_t*>(lengths)[row];
    return length < 0 ? 0 : length < width ? length : width;  // a pointer moved below 0 could wrap
  }
};

// IoU of two boxes x1 y1 x2 y2, or GIoU; see kernels/boxes.py. In fp64, where no area of fp32 boxes overflows.
BOXGRPO_HD float iou_of(const float* a, const float* b, bool generalized) {
  const double ax = static_cast<double>(a[2]) - a[0], ay = static_cast<double>(a[3]) - a[1];
  const double bx = static_cast<double>(b[2]) - b[0], by = static_cast<double>(b[3]) - b[1];
  const double left = a[0] > b[0] ? a[0] : b[0], right = a[2] < b[2] ? a[2] : b[2];
  const double top = a[1] > b[1] ? a[1] : b[1], bottom = a[3] < b[3] ? a[3] : b[3];
  const double overlap = right > left && bottom > top ? (right - left) * (bottom - top) : 0;
  const double both = ax * ay + bx * by - overlap;
  // False, too, where a coordinate is infinite or not a number.
  const bool proper = ax > 0 && ay > 0 && bx > 0 && by > 0 && both < 1e300;
  if (!proper) return generalized ? -1.0f : 0.0f;
  const double iou = overlap < both ? overlap / both : 1;
  if (!generalized) return static_cast<float>(iou);
  const double width = (a[2] > b[2] ? a[2] : b[2]) - static_cast<double>(a[0] < b[0] ? a[0] : b[0]);
  const double height = (a[3] > b[3] ? a[3] : b[3]) - static_cast<double>(a[1] < b[1] ? a[1] : b[1]);
  const double hull = width * height;
  return static_cast<float>(both < hull ? iou - (hull - both) / hull : iou);
}

struct Rewards {
  const float* gold;       // (n, 4)
  const uint8_t* formats;  // (n)
  float *accuracy, *format, *boxes;  // (n), (n), (n, 4)
  bool* found;                       // (n)
  int32_t* spans;                    // (n, 4)
  int64_t n;

  BOXGRPO_HD void write(int64_t row, const BoxParser& parser) const {
    float box[4];
    for (int k = 0; k < 4; ++k) {
      boxes[4 * row + k] = box[k] = parser.coordinate(k);
      spans[4 * row + k] = parser.span(k);
    }
    accuracy[row] = iou_of(box, gold + 4 * row, false);
    format[row] = parser.well_formed();
    found[row] = parser.found();
  }
};

struct Overlaps {
  const float *a, *b;  // (n, 4) and (m, 4); m is n where they are not compared pairwise
  float* out;          // (n, m) or (n)
  int64_t n, m;
  bool pairwise, generalized;

  BOXGRPO_HD int64_t size() const { return pairwise ? n * m : n; }

  BOXGRPO_HD void write(int64_t i) const {
    const int64_t row = pairwise ? i / m : i, column = pairwise ? i % m : i;
    out[i] = iou_of(a + 4 * row, b + 4 * column, generalized);
  }
};

void score_on_cpu(const Texts& texts, const Rewards& rewards);
void score_on_cpu(const Tokens& tokens, const Rewards& rewards);
void overlap_on_cpu(const Overlaps& overlaps);

// On a stream (cudaStream_t) of the current device. Returns nullptr, or CUDA's error message.
const char* score_on_cuda(const Texts& texts, const Rewards& rewards, void* stream);
const char* score_on_cuda(const Tokens& tokens, const Rewards& rewards, void* stream);
const char* overlap_on_cuda(const Overlaps& overlaps, void* stream);

}  // namespace boxgrpo
