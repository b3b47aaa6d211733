// The CPU launchers: completions in parallel on torch's threads.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "launch.h"
#include "token_row.h"

namespace boxgrpo {
namespace {

constexpr int64_t kGrain = 16;  // completions of a thread, at least

uint8_t checked_format(const Rewards& rewards, int64_t row) {
  const uint8_t format = rewards.formats[row];
  TORCH_CHECK_VALUE(format < kFormats, "answer_format holds the code ", int{format}, "; codes are 0 to ",
                    kFormats - 1, ", see ANSWER_FORMATS.");
  return format;
}

struct Refuse {
  [[noreturn]] static void id(int64_t id, int64_t vocabulary) {
    TORCH_CHECK_INDEX(false, "ids holds ", id, "; the table covers 0 to ", vocabulary - 1,
                      ". Build it for every id that the model can emit.");
  }
  [[noreturn]] static void bytes(int64_t end, int64_t size) {
    TORCH_CHECK_INDEX(false, "a token of the table ends at ", end, ", outside its ", size,
                      " bytes. Make it with VocabularyBytes.build.");
  }
};

}  // namespace

void score_on_cpu(const Texts& texts, const Rewards& rewards) {
  at::parallel_for(0, rewards.n, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t start = texts.offsets[row], end = texts.offsets[row + 1];
      TORCH_CHECK_INDEX(0 <= start && start <= end && end <= texts.size, "offsets go from ", start, " to ", end,
                        " in a text of ", texts.size, " bytes; they must not decrease and must stay inside it.");
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
    for (int64_t row = first; row < last; ++row)
      score_row<Refuse>(tokens, rewards, row, checked_format(rewards, row));
  });
}

void overlap_on_cpu(const Overlaps& overlaps) {
  at::parallel_for(0, overlaps.size(), 1024 * kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) overlaps.write(i);
  });
}

}  // namespace boxgrpo
