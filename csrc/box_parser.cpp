// The CPU launchers: completions in parallel on torch's threads.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "launch.h"

namespace boxgrpo {
namespace {

constexpr int64_t kGrain = 16;     // completions that are worth a thread
constexpr int64_t kTile = 4096;    // bytes of tokens that are parsed at a time
constexpr int64_t kShort = 16;     // bytes that one copy moves, needed or not

uint8_t checked_format(const Rewards& rewards, int64_t row) {
  const uint8_t format = rewards.formats[row];
  TORCH_CHECK_VALUE(format < kFormats, "answer_format holds the code ", int{format}, "; codes are 0 to ",
                    kFormats - 1, ", see ANSWER_FORMATS.");
  return format;
}

void score_row(const Tokens& tokens, const Rewards& rewards, int64_t row) {
  const uint8_t format = checked_format(rewards, row);
  BoxParser parser(format);
  uint8_t tile[kTile + kShort];
  int64_t filled = 0;
  const int64_t* ids = tokens.ids + row * tokens.width;
  for (int64_t t = 0, length = tokens.length(row); t < length; ++t) {
    const int64_t id = ids[t];
    TORCH_CHECK_INDEX(0 <= id && id < tokens.vocabulary, "ids holds ", id, "; the table covers 0 to ",
                      tokens.vocabulary - 1, ". Build it for every id that the model can emit.");
    if (tokens.eos[id]) break;
    if (tokens.marks[id] && format != kMarked) continue;
    const int64_t start = tokens.offsets[id], size = tokens.offsets[id + 1] - start;
    TORCH_CHECK_INDEX(0 <= start && 0 <= size && size <= tokens.size - start, "the table's offsets of id ", id,
                      " leave its ", tokens.size, " bytes. Make it with VocabularyBytes.build.");
    if (filled + size > kTile) {
      parser.feed(tile, tile + filled);
      filled = 0;
    }
    const uint8_t* bytes = tokens.bytes + start;
    if (size <= kShort && kShort <= tokens.size - start) {
      memcpy(tile + filled, bytes, kShort);
    } else if (size <= kTile) {
      memcpy(tile + filled, bytes, size);
    } else {
      parser.feed(bytes, bytes + size);
      continue;
    }
    filled += size;
  }
  parser.feed(tile, tile + filled);
  rewards.write(row, parser);
}

}  // namespace

void score_on_cpu(const Texts& texts, const Rewards& rewards) {
  at::parallel_for(0, rewards.n, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t start = texts.offsets[row], end = texts.offsets[row + 1];
      TORCH_CHECK_INDEX(0 <= start && start <= end && end <= texts.size, "offsets go from ", start, " to ", end,
                        " in a text of ", texts.size, " bytes; they must not fall and must stay inside it.");
      TORCH_CHECK_INDEX(end - start <= INT32_MAX, "completion ", row, " has ", end - start,
                        " bytes; spans are counted in int32. Cut it below 2 GiB.");
      BoxParser parser(checked_format(rewards, row));
      parser.feed(texts.bytes + start, texts.bytes + end);
      rewards.write(row, parser);
    }
  });
}

void score_on_cpu(const Tokens& tokens, const Rewards& rewards) {
  at::parallel_for(0, rewards.n, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) score_row(tokens, rewards, row);
  });
}

void overlap_on_cpu(const Overlaps& overlaps) {
  at::parallel_for(0, overlaps.size(), 1024 * kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) overlaps.write(i);
  });
}

}  // namespace boxgrpo
