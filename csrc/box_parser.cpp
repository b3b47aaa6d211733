// The CPU launchers: completions in parallel on torch's threads.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "launch.h"

namespace boxgrpo {
namespace {

constexpr int64_t kGrain = 16;   // completions that are worth a thread
constexpr int64_t kRun = 16;     // tokens that are parsed at a time
constexpr int64_t kCopied = 16;  // bytes that are copied of a short token, its own or not

uint8_t checked_format(const Rewards& rewards, int64_t row) {
  const uint8_t format = rewards.formats[row];
  TORCH_CHECK_VALUE(format < kFormats, "answer_format holds the code ", int{format}, "; codes are 0 to ",
                    kFormats - 1, ", see ANSWER_FORMATS.");
  return format;
}

[[noreturn]] void refuse_id(int64_t id, int64_t vocabulary) {
  TORCH_CHECK_INDEX(false, "ids holds ", id, "; the table covers 0 to ", vocabulary - 1,
                    ". Build it for every id that the model can emit.");
}

Entry checked_entry(const Tokens& tokens, int64_t id) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(tokens.vocabulary)) refuse_id(id, tokens.vocabulary);
  return Entry(tokens.entries[id]);
}

const uint8_t* checked_bytes(const Tokens& tokens, const Entry& entry) {
  const int64_t end = entry.start() + entry.size();
  TORCH_CHECK_INDEX(end <= tokens.size, "a token of the table ends at ", end, ", outside its ", tokens.size,
                    " bytes. Make it with VocabularyBytes.build.");
  return tokens.bytes + entry.start();
}

void score_row(const Tokens& tokens, const Rewards& rewards, int64_t row) {
  const uint8_t format = checked_format(rewards, row);
  BoxParser parser(format);
  const int64_t last_start = tokens.size - kCopied;  // of what a copy of that size may read
  const int64_t* id = tokens.ids + row * tokens.width;
  const int64_t* end = id + tokens.length(row);
  bool ended = false;
  while (id < end && !ended) {
    if (parser.is_outside()) {  // most tokens are counted, not read
      int64_t passed = 0;
      Entry last(0);
      for (; id < end; ++id) {
        const Entry entry = checked_entry(tokens, *id);
        if (!entry.may_pass(parser)) break;
        passed += entry.size();
        last = entry;
      }
      if (last.size()) parser.pass(passed, checked_bytes(tokens, last)[last.size() - 1]);
    }
    uint8_t run[kRun * kCopied];
    uint8_t* filled = run;
    for (const int64_t* stop = end - id < kRun ? end : id + kRun; id < stop && !ended; ++id) {
      const Entry entry = checked_entry(tokens, *id);
      ended = entry.role() == Entry::kEos;
      if (ended || entry.is_silent(format)) continue;
      if (entry.size() <= kCopied && entry.start() <= last_start) {
        memcpy(filled, tokens.bytes + entry.start(), kCopied);
        filled += entry.size();
        continue;
      }
      const uint8_t* bytes = checked_bytes(tokens, entry);
      parser.feed(run, filled);
      parser.feed(bytes, bytes + entry.size());
      filled = run;
    }
    parser.feed(run, filled);
  }
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
