// Reads a completion's answer in one pass over its bytes: the spans of think and answer, the box, the format. One source
// for the CPU and for CUDA: no torch, no STL, no allocation, no regular expression.
//
// What it finds is what the regular expressions of kernels/rewards.py find, byte for byte: the tests fuzz the two
// against each other.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__) && !defined(__CUDACC__) && !defined(__CUDA_ARCH__)
#include <emmintrin.h>
#endif

#ifdef __CUDACC__
#define BOXGRPO_HD __host__ __device__ __forceinline__
#else
#define BOXGRPO_HD inline
#endif

namespace boxgrpo {

// ANSWER_FORMATS of kernels/rewards.py.
enum Format : uint8_t { kThink, kBox, kMarked, kList, kFractions, kFormats };

constexpr uint32_t kCoordinateLimit = 2147483647;  // larger numbers saturate here
constexpr uint32_t kExponentLimit = 63;            // and exponents here, in 6 bits of marks_

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "find() takes a word's first byte from its low end");

// The first of two bytes in [p, end), else end; eight bytes at a time.
BOXGRPO_HD const uint8_t* find(const uint8_t* p, const uint8_t* end, uint8_t one, uint8_t other) {
#if defined(__SSE2__) && !defined(__CUDACC__) && !defined(__CUDA_ARCH__)
  const __m128i ones = _mm_set1_epi8(static_cast<char>(one)), others = _mm_set1_epi8(static_cast<char>(other));
  for (; end - p >= 16; p += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const int hits = _mm_movemask_epi8(_mm_or_si128(_mm_cmpeq_epi8(bytes, ones), _mm_cmpeq_epi8(bytes, others)));
    if (hits) return p + __builtin_ctz(hits);
  }
#endif
  constexpr uint64_t kOnes = 0x0101010101010101u, kTops = 0x8080808080808080u;
#ifdef __CUDA_ARCH__
  for (; p != end && reinterpret_cast<uintptr_t>(p) % 8; ++p)  // a GPU loads words from multiples of 8 alone
    if (*p == one || *p == other) return p;
#endif
  for (; end - p >= 8; p += 8) {
    uint64_t word;
#ifdef __CUDA_ARCH__
    word = *reinterpret_cast<const uint64_t*>(p);
#else
    memcpy(&word, p, 8);
#endif
    const uint64_t a = word ^ kOnes * one, b = word ^ kOnes * other;
    // A byte that is 0 sets its top bit. A borrow may set bits above it, never below: the lowest is right.
    const uint64_t hits = (((a - kOnes) & ~a) | ((b - kOnes) & ~b)) & kTops;
#ifdef __CUDA_ARCH__
    if (hits) return p + (__ffsll(hits) - 1) / 8;
#else
    if (hits) return p + __builtin_ctzll(hits) / 8;
#endif
  }
  for (; p != end; ++p)
    if (*p == one || *p == other) return p;
  return end;
}

// Reads a completion in pieces, cut anywhere, and afterwards gives the results. Completions under 2 GiB.
class BoxParser {
 public:
  BOXGRPO_HD explicit BoxParser(uint8_t format)
      : shape_(format < kList ? "(9~,_9~),_(9~,_9~)"
                              : "[_\"-9~.8:e+7;\",_\"-9~.8:e+7;\",_\"-9~.8:e+7;\",_\"-9~.8:e+7;\"_]"),
        format_(format),
        searching_(format != kThink && format != kMarked) {}

  BOXGRPO_HD void feed(const uint8_t* begin, const uint8_t* end) {
    if (begin == end) return;
    for (const uint8_t* p = begin; p != end; ++p) {
      if (place_ == kOutside) {
        p = find(p, end, '<', searching_ ? open() : '<');
        if (p == end) break;
      } else if (place_ == kInTag) {
        p = walk(p, end);
        if (p == end) break;
      }
      step(*p, size_ + static_cast<uint32_t>(p - begin));
    }
    size_ += static_cast<uint32_t>(end - begin);
    last_ = end[-1];
  }

  // Outside of tags and boxes, bytes without '<' need not be fed, except for the last one; while a box is searched for,
  // only bytes without '(' and '[' as well.
  BOXGRPO_HD bool is_outside() const { return place_ == kOutside; }
  BOXGRPO_HD bool is_searching() const { return searching_; }

  BOXGRPO_HD void pass(int64_t bytes, uint8_t last) {
    size_ += static_cast<uint32_t>(bytes);
    last_ = last;
  }

  // The results, to be read after the last piece.
  BOXGRPO_HD bool found() const { return have_box_ && (format_ != kThink || answer_[1] >= 0); }

  BOXGRPO_HD bool well_formed() const {
    if (format_ != kThink) return have_box_;
    const uint32_t whole = static_cast<uint32_t>(whole_);
    return whole_ >= 0 && (whole == size_ || (whole + 1 == size_ && last_ == '\n'));  // as Python's $
  }

  // Coordinate k of the box, in 0-1000 or as written where that is not the format's scale; 0 where none was found.
  BOXGRPO_HD float coordinate(int k) const {
    if (!found()) return 0;
    const double unit = format_ == kFractions ? 1000 : 1;
    double value = whole_part_[k] * unit + decimals_[k] * 1e-9 * unit;
    const uint32_t marks = marks_ >> 8 * k;
    for (uint32_t e = marks & kExponentLimit; e > 0; --e) value *= marks & 64 ? 0.1 : 10;
    value = value < kCoordinateLimit ? value : kCoordinateLimit;
    return static_cast<float>(marks & 128 ? -value : value);
  }

  // Think start, think end, answer start, answer end.
  BOXGRPO_HD int32_t span(int k) const {
    const int32_t* pair = k < 2 ? think_ : answer_;
    return pair[1] < 0 ? -1 : pair[k % 2];
  }

 private:
  enum Place : uint8_t { kOutside, kInTag, kAfterThink, kInBox, kAfterBox };

  // The tags end to end, without their '<'. Inside a tag `at_` is a position here; after its '>' it is one of these.
  enum Tag : uint8_t { kThinkTag = 6, kAnswerTag = 13, kThinkEnd = 20, kAnswerEnd = 28, kBoxStart = 40, kBoxEnd = 50 };
  static constexpr uint8_t kNoTag = 255;

  BOXGRPO_HD static uint8_t next_in_tag(uint8_t at, uint8_t byte) {
    const char* tags = "think>answer>/think>/answer>|box_start|>|box_end|>";
    if (at == 0) {
      at = byte == 'a' ? kThinkTag : byte == '/' ? kAnswerTag : byte == '|' ? kAnswerEnd : 0;
    } else if (at == kAnswerTag + 1 && byte == 'a') {
      at = kThinkEnd + 1;  // "</" goes on to "answer>"
    } else if (at == kAnswerEnd + 5 && byte == 'e') {
      at = kBoxStart + 5;  // "<|box_" goes on to "end|>"
    }
    return byte == static_cast<uint8_t>(tags[at]) ? at + 1 : kNoTag;
  }

  // Inside a tag: to its '>', to the first byte that is not the tag's, or to the end. step() reads the byte returned.
  BOXGRPO_HD const uint8_t* walk(const uint8_t* p, const uint8_t* end) {
    uint8_t at = at_;
    for (; p != end && *p != '>'; ++p) {
      const uint8_t next = next_in_tag(at, *p);
      if (next == kNoTag) break;
      at = next;
    }
    at_ = at;
    return p;
  }

  BOXGRPO_HD uint8_t open() const { return static_cast<uint8_t>(shape_[0]); }

  BOXGRPO_HD static bool is_space(uint8_t byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

  BOXGRPO_HD void step(uint8_t byte, uint32_t position) {
    if (byte == '<') {
      before_tag_ = place_;
      place_ = kInTag;
      at_ = 0;
      return;
    }
    switch (place_) {
      case kInTag:
        at_ = next_in_tag(at_, byte);
        if (at_ == kNoTag) break;
        if (byte == '>') close_tag(static_cast<int32_t>(position + 1));
        return;
      case kAfterThink:
        if (is_space(byte)) return;
        break;
      case kInBox:
        if (step_in_box(byte)) return;
        break;
      default:
        break;
    }
    // The tag or box that was being read ends wrongly here; a box can begin with this byte, but with no earlier one.
    place_ = searching_ && byte == open() ? kInBox : kOutside;
    at_ = 1;
    exact_ = false;
  }

  // Whether this byte continues the box, or completes it.
  BOXGRPO_HD bool step_in_box(uint8_t byte) {
    const uint32_t digit = byte - uint32_t{'0'};
    for (;; ++at_) {
      const char want = shape_[at_];
      switch (want) {
        case '9':
          if (digit > 9) return false;
          begin_number();
          add_digit(digit);
          ++at_;
          return true;
        case '~':
          if (digit > 9) continue;
          add_digit(digit);
          return true;
        case '8':
        case '7':
          if (digit > 9) return false;
          want == '8' ? add_decimal(digit) : add_exponent(digit);
          ++at_;
          return true;
        case ':':
        case ';':
          if (digit > 9) continue;
          want == ':' ? add_decimal(digit) : add_exponent(digit);
          return true;
        case '-':
        case '+':
          minus_ = byte == '-';
          if (byte != '-' && byte != want) continue;
          ++at_;
          return true;
        case '"':
        case '.':
        case 'e':
          if (byte != want && (want != 'e' || byte != 'E')) {
            at_ += want == '"' ? 0 : want == '.' ? 2 : 3;
            continue;
          }
          ++at_;
          return true;
        case '_':
          if (!is_space(byte)) continue;
          return true;
        default:
          if (byte != static_cast<uint8_t>(want)) return false;
          if (shape_[++at_] == 0) end_box();
          return true;
      }
    }
  }

  BOXGRPO_HD void end_box() {
    place_ = exact_ ? kAfterBox : kOutside;
    have_box_ |= searching_;
    searching_ = false;
  }

  // `end`: bytes up to and with the '>'.
  BOXGRPO_HD void close_tag(int32_t end) {
    const bool right_after_box = before_tag_ == kAfterBox;
    place_ = kOutside;
    switch (at_) {
      case kThinkTag:
        if (think_[0] < 0) think_[0] = end;
        break;
      case kThinkEnd:
        if (think_[0] < 0) break;
        if (think_[1] < 0) think_[1] = end - 8;
        place_ = kAfterThink;
        break;
      case kAnswerTag:
        if (answer_[0] < 0) {
          answer_[0] = end;
          searching_ |= format_ == kThink;
        }
        if (format_ == kThink && before_tag_ == kAfterThink) expect_box();
        break;
      case kAnswerEnd:
        if (answer_[0] >= 0 && answer_[1] < 0) {
          answer_[1] = end - 9;
          searching_ &= format_ != kThink;
        }
        if (right_after_box) whole_ = end;
        break;
      case kBoxStart:
        if (format_ == kMarked) expect_box();
        break;
      default:
        have_box_ |= format_ == kMarked && right_after_box;
    }
  }

  // The required format has a box from the next byte on, and a tag right after it.
  BOXGRPO_HD void expect_box() {
    place_ = kInBox;
    at_ = 0;
    exact_ = true;
  }

  // The last four numbers are kept; once they are a box, they stay.
  BOXGRPO_HD void begin_number() {
    if (have_box_) return;
    for (int k = 0; k < 3; ++k) {
      whole_part_[k] = whole_part_[k + 1];
      decimals_[k] = decimals_[k + 1];
    }
    whole_part_[3] = decimals_[3] = 0;
    marks_ = marks_ >> 8 | uint32_t{minus_} << 31;
    unit_ = 100000000;
  }

  BOXGRPO_HD void add_digit(uint32_t digit) {
    if (have_box_) return;
    const uint64_t value = whole_part_[3] * uint64_t{10} + digit;
    whole_part_[3] = value < kCoordinateLimit ? static_cast<uint32_t>(value) : kCoordinateLimit;
  }

  BOXGRPO_HD void add_decimal(uint32_t digit) {
    if (have_box_) return;
    decimals_[3] += digit * unit_;
    unit_ /= 10;  // 0 from the tenth on
  }

  BOXGRPO_HD void add_exponent(uint32_t digit) {
    if (have_box_) return;
    const uint32_t value = (marks_ >> 24 & kExponentLimit) * 10 + digit;
    marks_ = (marks_ & 0x80ffffff) | uint32_t{minus_} << 30 | (value < kExponentLimit ? value : kExponentLimit) << 24;
  }

  // A box in its format. 9 is a number's first digit, ~ its others; . may be a point, 8 is then the first decimal and
  // : the others; e may be e or E, 7 is then the exponent's first digit and ; the others; -, + and " may be there (for
  // + also a minus); _ is any white space; the rest stands for itself.
  const char* shape_;
  uint8_t format_;
  bool searching_;         // an open() anywhere begins a box
  bool exact_ = false;     // the box being read begins where the format requires it
  bool have_box_ = false;  // its numbers are kept
  Place place_ = kOutside, before_tag_ = kOutside;
  uint8_t at_ = 0;  // in the tag or the box
  uint8_t last_ = 0;
  uint32_t size_ = 0;  // bytes read
  int32_t think_[2] = {-1, -1}, answer_[2] = {-1, -1};
  int32_t whole_ = -1;  // where the last well-formed answer ended
  uint32_t whole_part_[4] = {0, 0, 0, 0}, decimals_[4] = {0, 0, 0, 0}, unit_ = 0;
  uint32_t marks_ = 0;  // a byte a number, the last one's highest: exponent (6 bits), its minus, the number's minus
  bool minus_ = false;  // of the number or exponent that is being read
};

}  // namespace boxgrpo
