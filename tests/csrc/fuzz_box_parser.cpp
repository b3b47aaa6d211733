// The parser against itself, fed in pieces and as token ids.
//
// With -fsanitize=fuzzer and -DBOXGRPO_LIBFUZZER this is a libFuzzer target; without, a program that reads cases
// (format, size in 4 bytes, text) from standard input and writes what it found in each. fuzz_rewards.py builds and runs
// both.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "token_row.h"

namespace {

using boxgrpo::Entry;
using Text = std::string_view;

struct Found {
  float box[4] = {0, 0, 0, 0};
  int32_t spans[4] = {-1, -1, -1, -1};
  uint8_t found = 0, well_formed = 0, padding[2] = {0, 0};
};
static_assert(sizeof(Found) == 36, "what fuzz_rewards.py reads");

// Each piece lies in memory of its own, so that a sanitizer sees a byte read beside it.
Found parsed(Text text, int format, const std::vector<size_t>& cuts) {
  boxgrpo::BoxParser parser(static_cast<uint8_t>(format));
  for (size_t k = 0, start = 0; k <= cuts.size(); ++k) {
    const size_t size = (k < cuts.size() ? cuts[k] : text.size()) - start;
    const std::unique_ptr<uint8_t[]> piece(new uint8_t[size]);
    text.copy(reinterpret_cast<char*>(piece.get()), size, start);
    parser.feed(piece.get(), piece.get() + size);
    start += size;
  }
  Found result;
  for (int k = 0; k < 4; ++k) {
    result.box[k] = parser.coordinate(k);
    result.spans[k] = parser.span(k);
  }
  result.found = parser.found();
  result.well_formed = parser.well_formed();
  return result;
}

void require_same(const Found& a, const Found& b, Text text, const char* what) {
  if (memcmp(&a, &b, sizeof(Found)) == 0) return;
  fprintf(stderr, "%s differs on %zu bytes: ", what, text.size());
  fwrite(text.data(), 1, text.size(), stderr);
  abort();
}

struct Refuse {  // there is nothing to assert_refused
  [[noreturn]] static void id(int64_t id, int64_t vocabulary) {
    fprintf(stderr, "id %ld is judged, of %ld\n", static_cast<long>(id), static_cast<long>(vocabulary));
    abort();
  }
  [[noreturn]] static void bytes(int64_t end, int64_t size) {
    fprintf(stderr, "a token ends at %ld, of %ld\n", static_cast<long>(end), static_cast<long>(size));
    abort();
  }
};

Entry::Role role_of(Text token) {  // as kernels/vocabulary.py
  if (token.empty() || token.find('<') != Text::npos) return Entry::kText;
  return token.find_first_of("([") == Text::npos ? Entry::kPlain : Entry::kBracket;
}

// The text as token ids, cut by what the text itself draws. Silent tokens lie between them, and behind their end what
// must not be read; each array ends where its memory does.
Found parsed_ids(Text text, int format) {
  std::minstd_rand draw(static_cast<unsigned>(std::hash<Text>()(text)));
  std::vector<int64_t> entries, row;
  std::string data;
  const auto add = [&](Text token, Entry::Role role) {
    row.push_back(static_cast<int64_t>(entries.size()));
    entries.push_back(static_cast<int64_t>((data.size() << 22 | token.size()) << 3 | role));
    data += token;
  };
  add("<answer>(5, 6), (7, 8)</answer>", Entry::kEos);
  row.clear();
  const unsigned kind = draw() % 8;  // most tokens are short; in some texts all fill what is copied of one
  for (Text rest = text; !rest.empty();) {
    if (format != boxgrpo::kMarked && draw() % 16 == 0) add("<|box_end|>", Entry::kMark);
    const Text token = rest.substr(0, kind == 0 ? boxgrpo::kCopied : draw() % (kind == 1 ? 40 : 6));
    add(token, role_of(token));
    rest.remove_prefix(token.size());
  }
  int64_t lengths[2] = {-(int64_t{1} << 60), static_cast<int64_t>(row.size())};
  const unsigned end = draw() % 3;
  const std::vector<int64_t> behind = {-100, static_cast<int64_t>(entries.size()), INT64_MAX, 0};
  if (end == 0) row.push_back(0);
  if (end < 2) row.insert(row.end(), behind.begin(), behind.end());
  if (end != 1) lengths[1] = INT64_MAX;
  const int64_t width = static_cast<int64_t>(row.size());
  std::vector<int64_t> ids(2 * row.size(), -100);  // a row of none before it
  std::copy(row.begin(), row.end(), ids.begin() + width);
  const std::vector<uint8_t> bytes(data.begin(), data.end());
  const std::vector<int64_t> table(entries);
  const int64_t size = static_cast<int64_t>(bytes.size()), vocabulary = static_cast<int64_t>(table.size());
  const boxgrpo::Tokens tokens{ids.data(), width, lengths, true, bytes.data(), table.data(), size, vocabulary};
  const float gold[8] = {};
  float accuracy[2], forms[2], boxes[8];
  bool is_found[2];
  int32_t spans[8];
  const boxgrpo::Rewards rewards{gold, nullptr, accuracy, forms, boxes, is_found, spans, 2};
  Found results[2];
  for (int k = 0; k < 2; ++k) {
    boxgrpo::score_row<Refuse>(tokens, rewards, k, static_cast<uint8_t>(format));
    memcpy(results[k].box, boxes + 4 * k, sizeof(results[k].box));
    memcpy(results[k].spans, spans + 4 * k, sizeof(results[k].spans));
    results[k].found = is_found[k];
    results[k].well_formed = forms[k] == 1;
  }
  require_same(results[0], Found{}, text, "a length below 0");
  return results[1];
}

Found checked(Text text, int format) {
  const Found whole = parsed(text, format, {});
  std::vector<size_t> every;
  for (size_t cut = 1; cut < text.size(); ++cut) every.push_back(cut);
  require_same(whole, parsed(text, format, every), text, "byte by byte");
  const size_t stride = text.size() / 64 + 1;  // every cut in two of a short text
  for (size_t cut = 0; cut <= text.size(); cut += stride)
    require_same(whole, parsed(text, format, {cut}), text, "cut in two");
  require_same(whole, parsed_ids(text, format), text, "token ids");
  return whole;
}

}  // namespace

#ifdef BOXGRPO_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  checked(Text(reinterpret_cast<const char*>(data) + 1, size - 1), data[0] % boxgrpo::kFormats);
  return 0;
}

#else

int main() {
  uint8_t format;
  uint32_t size;
  while (fread(&format, 1, 1, stdin) == 1 && fread(&size, 4, 1, stdin) == 1) {
    std::string text(size, 0);
    if (fread(text.data(), 1, size, stdin) != size) return 1;
    const Found result = checked(text, format);
    fwrite(&result, sizeof(Found), 1, stdout);
  }
}

#endif
