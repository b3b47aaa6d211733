// How a CPU reads a completion given as token ids. No torch: its launcher and the fuzz driver share it.
#pragma once

#include "launch.h"

namespace boxgrpo {

constexpr int64_t kRun = 16;     // tokens that are parsed at a time
constexpr int64_t kCopied = 16;  // bytes that are copied for a short token, beyond its own ones too

template <typename Refuse>
Entry checked_entry(const Tokens& tokens, int64_t id) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(tokens.vocabulary)) Refuse::id(id, tokens.vocabulary);
  return Entry(tokens.entries[id]);
}

template <typename Refuse>
const uint8_t* checked_bytes(const Tokens& tokens, const Entry& entry) {
  const int64_t end = entry.start() + entry.size();
  if (end > tokens.size) Refuse::bytes(end, tokens.size);
  return tokens.bytes + entry.start();
}

// An id outside the table is passed to Refuse::id(id, vocabulary), bytes outside of it to Refuse::bytes(a token's end,
// size); neither returns. The parser is a local variable, so that its fields can stay in registers.
template <typename Refuse>
void score_row(const Tokens& tokens, const Rewards& rewards, int64_t row, uint8_t format) {
  BoxParser parser(format);
  const int64_t last_start = tokens.size - kCopied;  // of what a copy of that size may read
  const int64_t* id = tokens.ids + row * tokens.width;
  const int64_t* end = id + tokens.length(row);
  bool ended = false;
  while (id < end && !ended) {
    if (parser.is_outside()) {  // most tokens are skipped: their bytes are counted, not read
      int64_t passed = 0;
      Entry last(0);
      for (; id < end; ++id) {
        const Entry entry = checked_entry<Refuse>(tokens, *id);
        if (!entry.may_pass(parser)) break;
        passed += entry.size();
        last = entry;
      }
      if (last.size()) parser.pass(passed, checked_bytes<Refuse>(tokens, last)[last.size() - 1]);
    }
    uint8_t run[kRun * kCopied];
    uint8_t* filled = run;
    for (const int64_t* stop = end - id < kRun ? end : id + kRun; id < stop && !ended; ++id) {
      const Entry entry = checked_entry<Refuse>(tokens, *id);
      ended = entry.role() == Entry::kEos;
      if (ended || entry.is_silent(format)) continue;
      if (entry.size() <= kCopied && entry.start() <= last_start) {
        memcpy(filled, tokens.bytes + entry.start(), kCopied);
        filled += entry.size();
        continue;
      }
      const uint8_t* bytes = checked_bytes<Refuse>(tokens, entry);
      parser.feed(run, filled);
      parser.feed(bytes, bytes + entry.size());
      filled = run;
    }
    parser.feed(run, filled);
  }
  rewards.write(row, parser);
}

}  // namespace boxgrpo
