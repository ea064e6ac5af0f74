// data_test.cu - everything that goes in or out, and every way in which it can be wrong.
//
// What it is: round trips, values that must never change silently, and tables of hostile files,
// each with the words that its error must say. What it is not: a test of the network.
// How to read it: the helpers, then the tables; a row is a file and what is wrong with it.
#include "../data/dataset.h"
#include "check.h"

#include <csignal>
#include <functional>

#include <gtest/gtest.h>
#include <sys/resource.h>

namespace fs = std::filesystem;

namespace {

// A test with a fresh directory, removed at its end.
class DataTest : public testing::Test {
 protected:
  DataTest() {
    std::string pattern = testing::TempDir() + "/data_test.XXXXXX";
    folder_ = mkdtemp(pattern.data());
  }
  ~DataTest() override { fs::remove_all(folder_); }

  std::string at(const std::string& name) const { return folder_ + "/" + name; }
  std::string put(const std::string& name, const std::string& bytes) const {
    fs::create_directories(fs::path(at(name)).parent_path());
    std::ofstream(at(name), std::ios::binary) << bytes;
    return at(name);
  }
  static std::string get(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  // How many files lie in the directory: a forgotten temporary is one too many.
  size_t files() const { return size_t(std::distance(fs::directory_iterator(folder_), {})); }

  std::string folder_;
};

template <class Number>
std::string raw(const std::vector<Number>& values) {
  return values.empty() ? ""
                        : std::string(reinterpret_cast<const char*>(values.data()),
                                      values.size() * sizeof(Number));
}
std::string safetensors(const std::string& header, const std::string& data) {
  return raw<uint64_t>({header.size()}) + header + data;
}

// While it lives, no file may grow beyond `bytes`: writes fail as on a full disk.
struct FullDisk {
  explicit FullDisk(rlim_t bytes) {
    handler = std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before);
    rlimit now = {bytes, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~FullDisk() {
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
  }
  rlimit before;
  void (*handler)(int);
};

// What load_dataset() gives and says.
struct Loaded {
  Split data;
  std::string out, err;
};
Loaded load(const std::string& where, size_t copies = 1) {
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  Loaded loaded;
  std::string error = error_of([&] { loaded.data = load_dataset(where, copies); });
  loaded.out = testing::internal::GetCapturedStdout();
  loaded.err = testing::internal::GetCapturedStderr();
  if (error != "no error") throw Error(error);
  return loaded;
}

// ---------------------------------------------------------------------------------------------
// safetensors

const char* const kGood = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";

TEST_F(DataTest, HostileSafetensorsAreRefused) {
  const std::string eight(8, '\0'), sixteen(16, '\0');
  auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets +
           "}}";
  };
  auto two = [](const std::string& first, const std::string& second) {
    return R"({"a":{"dtype":"F32","shape":[2],"data_offsets":)" + first +
           R"(},"b":{"dtype":"F32","shape":[2],"data_offsets":)" + second + "}}";
  };
  const std::string good = one("\"F32\"", "[2]", "[0,8]");
  const std::string big = "18446744073709551615";
  struct {
    std::string bytes, words;
  } table[] = {
      {"", "it has 0 bytes"},
      {"1234567", "it has 7 bytes"},
      {raw<uint64_t>({17}) + "{}", "truncated: its header claims 17 bytes, but only 2 follow"},
      {raw<uint64_t>({100'000'001}) + "{}", "at most 100000000"},
      {raw<uint64_t>({UINT64_MAX}) + "{}", "at most 100000000"},
      {raw<uint64_t>({0}), "not valid JSON"},
      {safetensors("{", ""), "not valid JSON"},
      {safetensors("{} x", ""), "not valid JSON at its byte 4"},
      {safetensors("hello", ""), "not valid JSON"},
      {safetensors("{\"\xff\":1}", ""), "not valid JSON"},
      {safetensors("{\"a\":1e999}", ""), "not valid JSON"},
      {safetensors("[]", ""), "not a JSON object"},
      {safetensors(" {}", ""), "begins with {"},
      {safetensors(std::string(100000, '['), ""), "nests deeper"},
      {safetensors(R"({"a":{"b":{"c":{}}}})", ""), "nests deeper"},
      {safetensors(R"({"a":1})", ""), "must have exactly"},
      {safetensors(R"({"a":{"dtype":"F32","shape":[2]}})", eight), "must have exactly"},
      {safetensors(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})", eight),
       "must have exactly"},
      {safetensors(R"({"a":{"dtype":"F32","shape":[2],"offsets":[0,8]}})", eight),
       "must have exactly"},
      {safetensors(one("\"F99\"", "[2]", "[0,8]"), eight), "unknown dtype"},
      {safetensors(one("32", "[2]", "[0,8]"), eight), "unknown dtype"},
      {safetensors(one("\"F32\"", "2", "[0,8]"), eight), "shape is not a list"},
      {safetensors(one("\"F32\"", "[-2]", "[0,8]"), eight), "shape is not a list of non-negative"},
      {safetensors(one("\"F32\"", "[2.0]", "[0,8]"), eight), "shape is not a list"},
      {safetensors(one("\"F32\"", "[\"2\"]", "[0,8]"), eight), "shape is not a list"},
      {safetensors(one("\"F32\"", "[99999999999999999999]", "[0,8]"), eight), "shape is not a"},
      {safetensors(one("\"F32\"", "[2]", "[-8,0]"), eight), "data_offsets is not a list"},
      {safetensors(one("\"F32\"", "[2]", "[8,0]"), eight), "expected [begin, end]"},
      {safetensors(one("\"F32\"", "[2]", "[0]"), eight), "expected [begin, end]"},
      {safetensors(one("\"F32\"", "[2]", "[0,8,16]"), eight), "expected [begin, end]"},
      {safetensors(one("\"F32\"", "[" + big + "]", "[0,8]"), eight), "overflows"},
      {safetensors(one("\"F32\"", "[4294967296,4294967296]", "[0,0]"), ""), "overflows"},
      {safetensors(one("\"U8\"", "[4294967296,4294967296,2]", "[0,0]"), ""), "overflows"},
      {safetensors(one("\"F32\"", "[3]", "[0,8]"), eight), "need 12 bytes, its offsets span 8"},
      {safetensors(one("\"F64\"", "[]", "[0,4]"), eight), "need 8 bytes, its offsets span 4"},
      {safetensors(one("\"U8\"", "[" + big + "]", "[0," + big + "]"), eight), "truncated"},
      {safetensors(good, std::string(7, '\0')), "truncated: it has 7 bytes of data, expected 8"},
      {safetensors(good, std::string(9, '\0')), "bytes after the last tensor"},
      {safetensors("{}", "x"), "bytes after the last tensor"},
      {safetensors(one("\"F32\"", "[2]", "[8,16]"), sixteen),
       "expected 0: the offsets leave a hole"},
      {safetensors(two("[0,8]", "[4,12]"), eight + "1234"), "expected 8: the offsets overlap"},
      {safetensors(two("[0,8]", "[0,8]"), eight), "overlap"},
      {safetensors(two("[0,8]", "[12,20]"), eight + eight + "1234"), "leave a hole"},
      {safetensors(two("[0,8]", "[8,16]").replace(54, 3, "\"a\""), sixteen), "has \"a\" twice"},
      {safetensors(R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
                   eight),
       "has \"dtype\" twice"},
      {safetensors(R"({"__metadata__":{"k":1}})", ""), "__metadata__ \"k\" is not a string"},
      {safetensors(R"({"__metadata__":{"k":{}}})", ""), "__metadata__ \"k\" is not a string"},
      {safetensors(R"({"__metadata__":[]})", ""), "__metadata__ is not"},
      {safetensors(R"({"__metadata__":{"k":"1","k":"2"}})", ""), "has \"k\" twice"},
      {safetensors(R"({"__metadata__":"x"})", ""), "__metadata__ is not"},
      {safetensors(R"({"\u001b[2J":1})", ""), "\\u001b[2J"},
      {safetensors("{\"\xc2\x9b"
                   "2J\x7f\":1}",
                   ""),
       "\"\\xc2\\x9b2J\\x7f\" must have"},
      {safetensors(R"({"a\n":{"dtype":"\u001b","shape":[2],"data_offsets":[0,8]}})", eight),
       "\"a\\n\" has an unknown dtype"},
      {safetensors(R"({"größe":1})", ""), "tensor \"größe\" must"},
  };
  SafetensorsReader(put("good", safetensors(good, eight)));
  SafetensorsReader(put("order", safetensors(two("[8,16]", "[0,8]"), sixteen)));
  // As the format's own library has it.
  EXPECT_TRUE(SafetensorsReader(put("null", safetensors(R"({"__metadata__":null})", "")))
                  .metadata()
                  .empty());
  for (const auto& row : table) {
    std::string path = put("hostile", row.bytes),
                error = error_of([&] { SafetensorsReader r(path); });
    EXPECT_PRED_FORMAT2(testing::IsSubstring, row.words, error) << row.bytes.substr(0, 200);
    EXPECT_PRED_FORMAT2(testing::IsSubstring, path, error);
    EXPECT_EQ(error, visible(error)) << "one sentence, one line, fit for a terminal";
  }
}

TEST(Visible, LettersStayAndNothingIsObeyed) {
  const std::string pairs[][2] = {{"", ""},
                                  {"plain ~ text", "plain ~ text"},
                                  {"größe 日本 🐱", "größe 日本 🐱"},
                                  {"a\nb\tc\r", "a\\x0ab\\x09c\\x0d"},
                                  {std::string("\0x", 2), "\\x00x"},
                                  {"\x1b[31m", "\\x1b[31m"},
                                  {"\x7f", "\\x7f"},
                                  {"\xc2\x9b"
                                   "2J",
                                   "\\xc2\\x9b2J"},
                                  {"\x9b"
                                   "2J",
                                   "\\x9b2J"},
                                  {"\xe2\x80\xa8", "\\xe2\\x80\\xa8"},  // a line separator
                                  {"\xe2\x80\xae", "\\xe2\\x80\\xae"},  // right to left
                                  {"\xe2\x81\xa6", "\\xe2\\x81\\xa6"},  // the same, isolated
                                  {"\xc1\x9b", "\\xc1\\x9b"},           // longer than needed
                                  {"\xe0\x82\x9b", "\\xe0\\x82\\x9b"},
                                  {"\xed\xa0\x80", "\\xed\\xa0\\x80"},           // half a letter
                                  {"\xf4\x90\x80\x80", "\\xf4\\x90\\x80\\x80"},  // beyond the last
                                  {"\xf8\x88\x80\x80\x80", "\\xf8\\x88\\x80\\x80\\x80"},
                                  {"\xe6\x97", "\\xe6\\x97"},  // cut
                                  {"\xe6\x97q", "\\xe6\\x97q"},
                                  {"\xff", "\\xff"}};
  for (const auto& [text, shown] : pairs) {
    EXPECT_EQ(visible(text), shown);
    EXPECT_EQ(error_of([&, &text = text] { fail("%s", text.c_str()); }), visible(text.c_str()));
  }
  std::string error = error_of([] { fail("%s: do this", std::string(100000, 'x').c_str()); });
  EXPECT_LE(error.size(), 1100u);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "x: do this", error) << "what helps is not cut off";
}

TEST_F(DataTest, EveryTruncationOfASafetensorsFileIsRefused) {
  const std::string whole = safetensors(kGood, "12345678");
  SafetensorsReader(put("whole", whole));
  for (size_t n = 0; n < whole.size(); ++n) {
    std::string path = put("cut", whole.substr(0, n));
    EXPECT_NE(error_of([&] { SafetensorsReader r(path); }), "no error") << n << " bytes";
  }
}

TEST_F(DataTest, WhatIsNotAFileCannotBeRead) {
  ASSERT_EQ(mkfifo(at("pipe").c_str(), 0600), 0);
  EXPECT_ERROR(SafetensorsReader r(at("none")), "No such file");
  EXPECT_ERROR(SafetensorsReader r(folder_), "not a regular file");
  EXPECT_ERROR(SafetensorsReader r(at("pipe")), "not a regular file");
  size_t C, H, W;
  for (std::string path : {at("pipe"), std::string("/dev/zero"), folder_})
    EXPECT_ERROR(read_png(path, &C, &H, &W), "cannot read " + path + ": it is not a regular file");
  EXPECT_ERROR(read_idx(at("pipe"), {}), "not a regular file");
  fs::create_directory(at("idx"));
  fs::create_symlink(at("pipe"), at("idx/train-images-idx3-ubyte.gz"));
  fs::create_symlink("/dev/zero", at("idx/train-labels-idx1-ubyte.gz"));
  EXPECT_ERROR(load_dataset(at("idx"), 1), "ubyte.gz: it is not a regular file");
  fs::rename(at("pipe"), at("x.safetensors"));
  EXPECT_ERROR(load_dataset(at("x.safetensors"), 1), "not a regular file");
}

// 10,000 layers have 80,000 tensors. In time that grows with their square these would take minutes.
TEST_F(DataTest, ManyTensorsAreReadInTheirNumber) {
  const size_t many = 100'000;
  std::string header = "{\"__metadata__\":{\"k\":\"v\"}";
  for (size_t i = 0; i < many; ++i)
    header += ",\"t" + std::to_string(i) + R"(":{"dtype":"U8","shape":[1],"data_offsets":[)" +
              std::to_string(i) + "," + std::to_string(i + 1) + "]}";
  auto start = std::chrono::steady_clock::now();
  SafetensorsReader reader(put("many", safetensors(header + "}", std::string(many, '\7'))));
  auto took = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(reader.tensors().size(), many);
  EXPECT_EQ(reader.metadata().at("k"), "v");
  EXPECT_EQ(reader.read<int64_t>(reader.require("t99999", {1})), std::vector<int64_t>{7});
  EXPECT_LT(took, std::chrono::seconds(30));
}

TEST_F(DataTest, NamesShapesKindsAndRangesAreChecked) {
  SafetensorsReader reader(put("file", safetensors(kGood, raw<float>({1, 2}))));
  const TensorInfo& a = reader.require("a", {2});
  float out[2];
  EXPECT_EQ(reader.find("b"), nullptr);
  EXPECT_ERROR(reader.require("b", {2}), "tensor \"b\" of shape [2] is missing");
  EXPECT_ERROR(reader.require("a", {1, 2}), "has shape [2], expected [1, 2]");
  EXPECT_ERROR(reader.require_only({"b"}), "unknown tensor \"a\"");
  EXPECT_ERROR(reader.require_only({"a", "b"}), "no error");
  EXPECT_ERROR(reader.read<int64_t>(a), "is F32, expected an integer dtype");
  EXPECT_ERROR(reader.read(a, out, 1, 2), "lie outside it");
  EXPECT_ERROR(reader.read(a, out, 3, 0), "lie outside it");
  EXPECT_ERROR(reader.read(a, out, 1, SIZE_MAX), "lie outside it");
  reader.read(a, out, 1, 1);
  EXPECT_EQ(out[0], 2);
  // A file that shrinks while it is open must not leave its reader waiting, or with garbage.
  fs::resize_file(at("file"), fs::file_size(at("file")) - 4);
  EXPECT_ERROR(reader.read(a, out, 0, 2), "became shorter");
}

// Two files and their index, read as one. `changed` and `by`: a part of the index to be another.
class ShardsTest : public DataTest {
 protected:
  ShardsTest() {
    save("1.safetensors", {"a", "b"}, {{"heads", "2"}, {"format", "pt"}});
    save("2.safetensors", {"c"}, {{"format", "pt"}, {"means", "global"}});
  }
  // Each tensor is (3) of its letter, as a number, and two more.
  void save(const std::string& name, const std::vector<std::string>& tensors,
            const std::map<std::string, std::string>& metadata = {}) const {
    SafetensorsWriter file(at(name), metadata);
    for (const std::string& t : tensors) file.declare(t, "F32", {3});
    for (const std::string& t : tensors) file.write(numbers(t).data(), 3);
    file.finish();
  }
  static std::vector<float> numbers(const std::string& t) {
    return {float(t[0]), float(t[0]) + 0.25f, float(t[0]) + 0.5f};
  }
  std::string index(const std::string& changed = "", const std::string& by = "") const {
    std::string text = R"({"metadata":{"total_size":36},"weight_map":)"
                       R"({"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}})";
    return put("x.safetensors.index.json", text.replace(text.find(changed), changed.size(), by));
  }
};

TEST_F(ShardsTest, AreReadAsOneFile) {
  SafetensorsReader file(index());
  std::vector<std::string> names;
  for (const TensorInfo& tensor : file.tensors()) {
    std::vector<float> read(3), second(1);
    names.push_back(tensor.name);
    file.read(tensor, read.data(), 0, 3);
    file.read(file.require(tensor.name, {3}), second.data(), 1, 1);
    EXPECT_EQ(read, numbers(tensor.name));
    EXPECT_EQ(second[0], read[1]);
  }
  EXPECT_EQ(names, (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{
                                 {"heads", "2"}, {"format", "pt"}, {"means", "global"}}));
  EXPECT_EQ(file.find("d"), nullptr);
  std::vector<float> read(3);
  EXPECT_ERROR(file.read(*file.find("c"), read.data(), 2, 2), "of tensor \"c\" lie outside it");
  EXPECT_ERROR(file.require("c", {4}), "index.json: tensor \"c\" has shape [3], expected [4]");
  // A link to an index lies elsewhere than its files: those beside the link are meant.
  fs::create_directories(at("other"));
  fs::create_symlink(at("x.safetensors.index.json"), at("other/x.safetensors.index.json"));
  EXPECT_ERROR(SafetensorsReader(at("other/x.safetensors.index.json")),
               "cannot open " + at("other/1.safetensors") + ": No such file");
}

TEST_F(ShardsTest, WhatDoesNotFitTheIndexIsRefused) {
  save("both.safetensors", {"b", "c"});
  save("three_heads.safetensors", {"c"}, {{"heads", "3"}});
  put("cut.safetensors", get(at("2.safetensors")).substr(0, 100));
  fs::create_directories(at("sub"));
  fs::copy(at("2.safetensors"), at("sub/2.safetensors"));
  const std::string outside = ", expected the name of a .safetensors beside the index";
  const struct {
    std::string changed, by, words;
  } table[] = {
      {"2.safe", "3.safe", "cannot open " + at("3.safetensors") + ": No such file"},
      {"2.safe", "cut.safe", at("cut.safetensors") + ": truncated"},
      {"2.safe", "1.safe", "index.json: tensor \"c\" is not in 1.safetensors"},
      {R"("b":"1.)", R"("b":"2.)", "tensor \"b\" is not in 2.safetensors"},
      {R"("b":"1.safetensors",)", "",
       "1.safetensors holds tensor \"b\", which the index does not place there"},
      {"2.safe", "both.safe", "both.safetensors holds tensor \"b\", which the index does not"},
      {"2.safe", "three_heads.safe", "its files contradict each other in metadata \"heads\""},
      {R"("b")", R"("a")", "the index has \"a\" twice"},
      {"2.safe", "sub/2.safe", "\"c\" is said to be in \"sub/2.safetensors\"" + outside},
      {"2.safe", "../2.safe", "\"../2.safetensors\"" + outside},
      {"2.safe", at("2.safe"), outside},
      {"2.safetensors", "2.safetensors\\u0000", outside},
      {"2.safetensors", "x.safetensors.index.json", outside},  // for ever
      {"2.safetensors", "", outside},
      {R"("2.safetensors")", "2", "the file of tensor \"c\" is not a string"},
      {"weight_map", "weights", "the index has no weight_map, {tensor: file}"},
      {R"({"a")", R"(["a"],"w":{"a")", "the index has no weight_map"},
      {R"({"a":)", R"({"a":[[[]]],"d":)", "the index nests deeper"},
      {R"(}})", "}", "the index is not valid JSON at its byte"},
      {R"({"meta)", R"([{"meta)", "the index is not valid JSON"},
  };
  for (const auto& row : table)
    EXPECT_ERROR(SafetensorsReader(index(row.changed, row.by)), row.words);
  EXPECT_ERROR(SafetensorsReader(put("x.safetensors.index.json", "[]")), "is not a JSON object");
  EXPECT_ERROR(SafetensorsReader(put("x.safetensors.index.json", "")), "is not valid JSON");
  EXPECT_ERROR(SafetensorsReader r(index()), "no error");
}

TEST_F(DataTest, HalfPrecision) {
  struct {
    uint16_t bits;
    float value;
  } table[] = {{0x0000, 0},         {0x0001, 0x1p-24f},        {0x03ff, 0x3ffp-24f},
               {0x0400, 0x1p-14f},  {0x3555, 0.333251953125f}, {0x3c00, 1},
               {0xc000, -2},        {0x7bff, 65504},           {0x7c00, INFINITY},
               {0xfc00, -INFINITY}, {0x8001, -0x1p-24f}};
  for (auto row : table) EXPECT_EQ(float(f16{row.bits}), row.value) << std::hex << row.bits;
  EXPECT_TRUE(std::signbit(float(f16{0x8000})));
  EXPECT_TRUE(std::isnan(float(f16{0x7e00})));
  // Between two powers of two the numbers are evenly spaced, and no two are equal.
  for (uint16_t bits = 0; bits < 0x7bff; ++bits)
    ASSERT_LT(float(f16{bits}), float(f16{uint16_t(bits + 1)})) << bits;
}

// Writes one tensor of T, checks that the file holds its very bytes, and reads it as R.
template <class Number, class R>
void round_trip(const std::string& path, const std::vector<Number>& values,
                const std::vector<R>& expected) {
  const std::vector<size_t> shape(1, values.size());  // nvcc drops the braces of {n} in a template
  SafetensorsWriter writer(path);
  writer.declare("x", dtype_name<Number>(), shape);
  writer.write(values.data(), values.size());
  writer.finish();
  SafetensorsReader reader(path);
  const TensorInfo& x = reader.require("x", shape);
  EXPECT_EQ(x.dtype, dtype_name<Number>());
  ASSERT_EQ(x.count(), values.size());
  std::vector<R> read(values.size());
  reader.read(x, read.data(), 0, read.size());
  for (size_t i = 0; i < read.size(); ++i)
    EXPECT_EQ(raw<R>({read[i]}), raw<R>({expected[i]})) << x.dtype << " number " << i;
}

TEST_F(DataTest, RoundTripsInEveryDtype) {
  const float inf = INFINITY;
  std::string p = at("file");
  round_trip<double, double>(p, {1.0 / 3, -0.0, 5e-324, inf}, {1.0 / 3, -0.0, 5e-324, inf});
  round_trip<double, float>(p, {1.0 / 3, 1e300, -1e-300}, {1.0f / 3, inf, -0.0f});
  round_trip<float, float>(p, {0.1f, -inf, 1e-45f}, {0.1f, -inf, 1e-45f});
  round_trip<float, double>(p, {0.1f, inf}, {double(0.1f), inf});
  // bf16 has 8 bits: 1 + 2^-8 is a tie and goes to the even 1, a little more goes up.
  round_trip<float, bf16>(p, {1 + 0x1p-8f, 1 + 0x1.02p-8f, 1 + 0x3p-8f},
                          {1.0f, 1 + 0x1p-7f, 1 + 0x1p-6f});
  round_trip<double, bf16>(p, {-2.5, 3e38}, {-2.5f, 3e38f});
  round_trip<bf16, bf16>(p, {1.5f, inf}, {1.5f, inf});
  round_trip<bf16, float>(p, {-3.140625f, inf}, {-3.140625f, inf});
  round_trip<f16, float>(p, {{0x0001}, {0x7c00}, {0xc248}}, {0x1p-24f, inf, -3.140625f});
  round_trip<f16, double>(p, {{0x0200}, {0x3c01}}, {0x1p-15, 1 + 0x1p-10});
  round_trip<f16, bf16>(p, {{0x3c01}, {0x3c04}}, {1.0f, 1.0f});
  round_trip<int64_t, int64_t>(p, {INT64_MIN, INT64_MAX}, {INT64_MIN, INT64_MAX});
  round_trip<int32_t, int64_t>(p, {INT32_MIN, 7}, {INT32_MIN, 7});
  round_trip<int16_t, int64_t>(p, {INT16_MIN, 7}, {INT16_MIN, 7});
  round_trip<int8_t, int64_t>(p, {-128, 127}, {-128, 127});
  round_trip<uint64_t, int64_t>(p, {0, uint64_t(INT64_MAX)}, {0, INT64_MAX});
  round_trip<uint32_t, int64_t>(p, {UINT32_MAX}, {UINT32_MAX});
  round_trip<uint16_t, int64_t>(p, {UINT16_MAX}, {UINT16_MAX});
  round_trip<uint8_t, int64_t>(p, {255}, {255});
  round_trip<bool8, int64_t>(p, {bool8(0), bool8(1)}, {0, 1});
  EXPECT_ERROR((round_trip<uint64_t, int64_t>(p, {UINT64_MAX}, {0})), "more than a signed");
  EXPECT_ERROR((round_trip<int32_t, float>(p, {1}, {1})), "is I32, expected a floating dtype");
}

TEST_F(DataTest, StreamsInPieces) {
  // More than the reader's buffer, and pieces that end anywhere.
  std::vector<float> big(700'001);
  for (size_t i = 0; i < big.size(); ++i) big[i] = float(i) * 0.5f;
  std::vector<int64_t> steps = {3, -4};
  SafetensorsWriter writer(at("file"), {{"depth", "48"}, {"quote", "\"\n"}});
  writer.declare("steps", "I64", {2});
  writer.declare("nothing", "F32", {0, 5});
  writer.declare("big", "F32", {big.size()});
  writer.declare("scalar", "F32", {});
  writer.write(&steps[0], 1);
  writer.write(&steps[1], 1);
  writer.write(big.data(), 0);
  for (size_t n = 0; n < big.size(); n += 99'991)
    writer.write(big.data() + n, std::min<size_t>(99'991, big.size() - n));
  EXPECT_FALSE(fs::exists(at("file"))) << "half a file must not be seen";
  writer.write(&big[7], 1);
  writer.finish();
  EXPECT_EQ(files(), 1u);

  SafetensorsReader reader(at("file"));
  EXPECT_EQ(reader.metadata().at("depth"), "48");
  EXPECT_EQ(reader.metadata().at("quote"), "\"\n");
  std::vector<std::string> names;
  for (const auto& tensor : reader.tensors()) names.push_back(tensor.name);
  EXPECT_EQ(names, (std::vector<std::string>{"steps", "nothing", "big", "scalar"}));
  EXPECT_EQ(reader.read<int64_t>(reader.require("steps", {2})), steps);
  EXPECT_EQ(reader.require("nothing", {0, 5}).count(), 0u);
  std::vector<double> read(big.size() - 5);
  reader.read(*reader.find("big"), read.data(), 5, read.size());
  for (size_t i = 0; i < read.size(); ++i) ASSERT_EQ(read[i], double(big[i + 5]));
  reader.read(reader.require("scalar", {}), read.data(), 0, 1);
  EXPECT_EQ(read[0], 3.5);
}

TEST_F(DataTest, TheDataBeginsAtAMultipleOfEight) {
  for (size_t n = 1; n <= 8; ++n) {
    SafetensorsWriter writer(at("file"));
    writer.declare(std::string(n, 'x'), "U8", {0});
    writer.finish();
    EXPECT_EQ(get(at("file"))[0] % 8, 0) << "the low byte of the header's length, name of " << n;
    SafetensorsReader reader(at("file"));
    EXPECT_EQ(reader.tensors().size(), 1u);
  }
}

TEST_F(DataTest, TheWriterRefusesAHeaderThatNoReaderTakes) {
  const size_t around = std::string(R"({"__metadata__":{"x":""}})").size();
  auto write = [&](size_t header) {
    SafetensorsWriter writer(at("file"), {{"x", std::string(header - around, 'x')}});
    writer.finish();
  };
  EXPECT_ERROR(write(largest_header + 1),
               "its header has 100000008 bytes and readers take at most");
  EXPECT_EQ(files(), 0u);
  write(largest_header);
  EXPECT_EQ(SafetensorsReader(at("file")).metadata().at("x").size(), largest_header - around);
}

TEST_F(DataTest, WriterRefusesMisuseAndLeavesNothing) {
  const float two[2] = {1, 2};
  auto writing = [&](auto use) {
    SafetensorsWriter writer(at("file"));
    writer.declare("a", "F32", {2});
    use(writer);
  };
  using Writer = SafetensorsWriter;
  EXPECT_ERROR(writing([](Writer& w) { w.declare("a", "F32", {2}); }), "the name is taken");
  EXPECT_ERROR(writing([](Writer& w) { w.declare("__metadata__", "F32", {}); }), "name is taken");
  EXPECT_ERROR(writing([](Writer& w) { w.declare("b", "F99", {2}); }), "unknown dtype");
  EXPECT_ERROR(writing([](Writer& w) { w.declare("b", "F32", {SIZE_MAX / 2}); }), "too large");
  EXPECT_ERROR(writing([](Writer& w) { w.declare("b", "U8", {SIZE_MAX}); }), "too large");
  EXPECT_ERROR(writing([](Writer& w) { w.declare("\xff", "U8", {0}), w.finish(); }), "not UTF-8");
  EXPECT_ERROR(writing([&](Writer& w) { w.write(two, 1), w.declare("b", "F32", {}); }),
               "after the");
  EXPECT_ERROR(writing([&](Writer& w) { w.write(two, 3); }), "more numbers than [2] holds");
  EXPECT_ERROR(writing([&](Writer& w) { w.write(two, 2), w.write(two, 1); }), "than were declared");
  EXPECT_ERROR(writing([&](Writer& w) { w.write(two, 1), w.finish(); }), "only 4 of 8");
  EXPECT_ERROR(writing([&](Writer& w) { w.finish(); }), "only 0 of 8");
  EXPECT_ERROR(writing([&](Writer& w) {
                 const double d = 1;
                 w.write(&d, 1);
               }),
               "is declared F32, not F64");
  EXPECT_ERROR(writing([&](Writer& w) { w.write(two, 1); }), "no error");  // and never finished
  EXPECT_ERROR(writing([&](Writer& w) {
                 EXPECT_ERROR(w.write(two, 3), "more numbers");
                 w.write(two, 2), w.finish();  // a writer that failed stays failed
               }),
               "closed already");
  EXPECT_EQ(files(), 0u);
}

// ---------------------------------------------------------------------------------------------
// Whole files or none

TEST_F(DataTest, AFullDiskLeavesTheOldFile) {
  const std::vector<float> numbers(1 << 20, 0.5f);
  std::vector<float> noise(64 * 64);
  for (size_t i = 0; i < noise.size(); ++i) noise[i] = float(gaussian(1, 2, i));
  struct {
    const char* name;
    std::function<void(const std::string&)> write;
  } table[] = {
      {"safetensors",
       [&](const std::string& path) {
         SafetensorsWriter writer(path);
         writer.declare("a", "F32", {numbers.size()});
         writer.write(numbers.data(), numbers.size());
         writer.finish();
       }},
      {"png",
       [&](const std::string& path) {
         write_png_grid(path, noise.data(), {1, 1, 1, 64, 64, 2});
       }},
      {"csv",  // small enough for the buffer, so the disk is met in commit()
       [](const std::string& path) {
         SafeFile file(path);
         file.write(std::string(600, 'x'));
         file.commit();
       }},
  };
  for (const auto& row : table) {
    std::string path = put("file", "old"), error;
    {
      FullDisk full(512);
      error = error_of([&] { row.write(path); });
    }
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "cannot write " + path, error) << row.name;
    EXPECT_PRED_FORMAT2(testing::IsSubstring, std::strerror(EFBIG), error) << row.name;
    EXPECT_EQ(get(path), "old") << row.name;
    EXPECT_EQ(files(), 1u) << row.name << " left its temporary";
    row.write(path);
    EXPECT_NE(get(path), "old") << row.name << ": with room it must work";
    EXPECT_EQ(files(), 1u) << row.name;
  }
}

TEST_F(DataTest, NoSpaceIsReportedAtOnceOrByTheDisk) {
  std::string path = put("file", "old");
  SafetensorsWriter writer(path);
  writer.declare("a", "F32", {size_t(1) << 58});
  float x = 0;
  EXPECT_ERROR(writer.write(&x, 1), "bytes and the disk has");
  EXPECT_EQ(get(path), "old");
  EXPECT_EQ(files(), 1u);
  rlimit before;  // no file may grow beyond 64 KB: it stands in for a full disk
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit now = {1 << 16, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &now);
  auto handler = std::signal(SIGXFSZ, SIG_IGN);
  EXPECT_ERROR((SafeFile(path).write(std::string(1 << 20, 'x'))), std::strerror(EFBIG));
  setrlimit(RLIMIT_FSIZE, &before), std::signal(SIGXFSZ, handler);
  EXPECT_EQ(get(path), "old");
  EXPECT_EQ(files(), 1u);
}

// What lies under the temporary's name, and links for the file itself.
TEST_F(DataTest, SafeFileTouchesNothingElse) {
  std::string path = put("file", "old"), precious = put("precious", "kept");
  fs::create_symlink(precious, path + ".tmp");
  EXPECT_ERROR(SafeFile(path).write("new"), "the link " + path + ".tmp is in the way");
  fs::remove(path + ".tmp");
  ASSERT_EQ(mkfifo((path + ".tmp").c_str(), 0600), 0);
  EXPECT_ERROR(SafeFile(path).write("new"), "is in the way and is no regular file");
  EXPECT_TRUE(fs::exists(path + ".tmp"));
  EXPECT_EQ(get(path) + get(precious), "oldkept");
  fs::create_symlink(precious, at("link"));
  SafeFile file(at("link"));
  file.write("through the link"), file.commit();
  EXPECT_EQ(get(precious), "through the link");
  EXPECT_TRUE(fs::is_symlink(at("link")));
}

TEST_F(DataTest, SafeFileReplacesPlainFilesOnly) {
  std::string path = put("file", "old");
  ASSERT_EQ(mkfifo(at("pipe").c_str(), 0600), 0);
  { SafeFile(path).write("abandoned"); }
  EXPECT_EQ(get(path), "old");
  EXPECT_ERROR(SafeFile(at("pipe")), "not a regular file");
  EXPECT_ERROR(SafeFile(folder_ + "/."), "not a regular file");
  EXPECT_ERROR(SafeFile(at("none/file")), "create its directory");
  EXPECT_EQ(files(), 2u);
  SafeFile file(path);
  file.write("new");
  file.commit();
  EXPECT_EQ(get(path), "new");
  EXPECT_ERROR(file.write("more"), "closed already");
  EXPECT_ERROR(file.commit(), "closed already");
  EXPECT_EQ(files(), 2u);
}

// ---------------------------------------------------------------------------------------------
// PNG

// A number of 256 that PNG keeps exactly.
float level(size_t i) { return float(i % 256) / 127.5f - 1; }

TEST_F(DataTest, PngRoundTrips) {
  constexpr size_t rows = 2, columns = 3, H = 4, W = 5, scale = 2, gap = 2;
  for (size_t C : {1, 2, 3}) {
    std::vector<float> images(rows * columns * C * H * W);
    for (size_t i = 0; i < images.size(); ++i) images[i] = level(i * 37);
    write_png_grid(at("grid.png"), images.data(), {rows, columns, C, H, W, scale});
    size_t c, h, w, colors = C < 3 ? 1 : 3;
    std::vector<float> grid = read_png(at("grid.png"), &c, &h, &w);
    ASSERT_EQ(c, colors);
    ASSERT_EQ(h, rows * (H * scale + gap) - gap);
    ASSERT_EQ(w, columns * (W * scale + gap) - gap);
    for (size_t i = 0; i < grid.size(); ++i) {
      size_t x = i % w, y = i / w % h, k = i / (w * h);
      size_t gy = y / (H * scale + gap), gx = x / (W * scale + gap);
      size_t iy = y % (H * scale + gap) / scale, ix = x % (W * scale + gap) / scale;
      float expected =
          iy < H && ix < W ? images[(((gy * columns + gx) * C + k) * H + iy) * W + ix] : 1;
      ASSERT_NEAR(grid[i], expected, 1e-6) << C << " channels, pixel " << y << " " << x;
    }
  }
  EXPECT_EQ(files(), 1u);
}

TEST_F(DataTest, PngClampsAndRefuses) {
  const float wild[4] = {-7, 7, NAN, -0.001f};
  size_t c, h, w;
  write_png_grid(at("wild.png"), wild, {1, 1, 1, 1, 4, 1});
  std::vector<float> read = read_png(at("wild.png"), &c, &h, &w);
  EXPECT_EQ(std::vector<float>(read.begin(), read.begin() + 3), (std::vector<float>{-1, 1, -1}));
  EXPECT_NEAR(read[3], 0, 0.004);
  EXPECT_ERROR(write_png_grid(at("x.png"), wild, {0, 1, 1, 1, 4}), "0 is no size");
  EXPECT_ERROR(write_png_grid(at("x.png"), wild, {1, 1, 1, 1, 4, SIZE_MAX}), "is no size");
  EXPECT_ERROR(write_png_grid(at("x.png"), wild, {1, 1, 1, 16384, 4, 2}), "more than 16384 a side");
  EXPECT_ERROR(write_png_grid(at("x.png"), wild, {1, 1, 4, 1, 1}),
               "x.png: a picture has three channels at most, not 4: name a .safetensors");
  EXPECT_ERROR(write_png_grid(at("none/x.png"), wild, {1, 1, 1, 1, 4}), "create its directory");
  EXPECT_ERROR(read_png(at("none.png"), &c, &h, &w), "No such file");
  EXPECT_ERROR(read_png(put("text.png", "not a picture"), &c, &h, &w), "not a whole PNG");
  EXPECT_ERROR(read_png(put("empty.png", ""), &c, &h, &w), "not a whole PNG");
  std::string whole = get(at("wild.png"));
  for (size_t n = 0; n < whole.size(); ++n)
    EXPECT_ERROR(read_png(put("cut.png", whole.substr(0, n)), &c, &h, &w), "cannot read");
}

std::string big_endian(std::vector<uint32_t> numbers) {
  std::string bytes;
  for (uint32_t n : numbers)
    for (int shift : {24, 16, 8, 0}) bytes += char(n >> shift);
  return bytes;
}
std::string chunk(const std::string& type, const std::string& data) {
  std::string body = type + data;
  auto sum = crc32(0, reinterpret_cast<const Bytef*>(body.data()), uInt(body.size()));
  return big_endian({uint32_t(data.size())}) + body + big_endian({uint32_t(sum)});
}
std::string deflated(const std::string& raw) {
  std::string out(compressBound(raw.size()), '\0');
  uLongf size = out.size();
  compress(reinterpret_cast<Bytef*>(out.data()), &size, reinterpret_cast<const Bytef*>(raw.data()),
           raw.size());
  return out.substr(0, size);
}
const std::string kSignature = "\x89PNG\r\n\x1a\n";
std::string header(uint32_t W, uint32_t H, int depth, int color, int interlaced = 0) {
  return kSignature + chunk("IHDR", big_endian({W, H}) + char(depth) + char(color) +
                                        std::string(2, '\0') + char(interlaced));
}
// A picture of one row. `before`: chunks before its numbers.
std::string png_row(uint32_t W, int depth, int color, const std::string& row,
                    const std::string& before = "", int interlaced = 0) {
  return header(W, 1, depth, color, interlaced) + before +
         chunk("IDAT", deflated(std::string(1, '\0') + row)) + chunk("IEND", "");
}

// Every kind of PNG, as numbers of 255.
TEST_F(DataTest, EveryKindOfPngIsReadForWhatItShows) {
  using std::string;
  const string transparent_3 = chunk("tRNS", string("\0\3", 2));
  struct {
    const char* kind;
    string bytes;
    size_t C;
    std::vector<double> levels;  // (C, W)
  } table[] = {
      {"grey", png_row(3, 8, 0, string("\0\x7f\xff", 3)), 1, {0, 127, 255}},
      {"1 bit", png_row(3, 1, 0, "\xa0"), 1, {255, 0, 255}},
      {"4 bits", png_row(2, 4, 0, "\x1f"), 1, {17, 255}},
      {"16 bits", png_row(2, 16, 0, string("\x12\x34\xff\xff", 4)), 1, {0x1234 / 257.0, 255}},
      {"rgb", png_row(1, 8, 2, "\x01\x02\x03"), 3, {1, 2, 3}},
      {"rgb, 16 bits",
       png_row(1, 16, 2, string("\1\0\2\0\3\0", 6)),
       3,
       {256 / 257.0, 512 / 257.0, 768 / 257.0}},
      {"palette",
       png_row(2, 8, 3, string("\1\0", 2), chunk("PLTE", "abcdef")),
       3,
       {'d', 'a', 'e', 'b', 'f', 'c'}},
      {"palette, one colour half seen",
       png_row(2, 8, 3, string("\1\0", 2), chunk("PLTE", "abcdef") + chunk("tRNS", "\xff\x33")),
       3,
       {'d' / 5.0, 'a', 'e' / 5.0, 'b', 'f' / 5.0, 'c'}},
      {"a short palette, all of which is grey",
       png_row(2, 1, 3, "\x40", chunk("PLTE", string("\0\0\0\1\1\1", 6))),
       3,
       {0, 1, 0, 1, 0, 1}},
      {"one grey unseen", png_row(2, 8, 0, "\3\4", transparent_3), 1, {0, 4}},
      {"grey, alpha", png_row(3, 8, 4, string("\x64\0\x64\x33\x64\xff", 6)), 1, {0, 20, 100}},
      {"rgb, alpha",
       png_row(2, 8, 6, string("\x0a\x14\x1e\0\x0a\x14\x1e\x33", 8)),
       3,
       {0, 2, 0, 4, 0, 6}},
      {"interlaced", png_row(2, 8, 0, "\5" + string("\0\6", 2), "", 1), 1, {5, 6}},
      {"two pieces",
       header(1, 1, 8, 0) + chunk("IDAT", deflated(string("\0\7", 2)).substr(0, 3)) +
           chunk("IDAT", deflated(string("\0\7", 2)).substr(3)) + chunk("IEND", ""),
       1,
       {7}},
  };
  for (const auto& row : table) {
    SCOPED_TRACE(row.kind);
    size_t C, H, W;
    std::vector<float> image = read_png(put("x.png", row.bytes), &C, &H, &W);
    ASSERT_EQ(C, row.C);
    ASSERT_EQ(image.size(), row.levels.size());
    for (size_t i = 0; i < image.size(); ++i)
      EXPECT_NEAR(image[i], row.levels[i] / 127.5 - 1, 2e-7) << i;
  }
  // What nobody sees leaves no bit.
  size_t C, H, W;
  std::vector<float> one, other;
  one = read_png(put("x.png", png_row(2, 8, 6, string("\1\2\3\0\x0a\x14\x1e\xff", 8))), &C, &H, &W);
  other =
      read_png(put("x.png", png_row(2, 8, 6, string("\7\7\7\0\x0a\x14\x1e\xff", 8))), &C, &H, &W);
  EXPECT_EQ(one, other);
  // A number of eight bits is what it is in a picture without alpha, to the last bit.
  for (int level = 0; level < 256; ++level) {
    one = read_png(put("x.png", png_row(1, 8, 0, string(1, char(level)))), &C, &H, &W);
    ASSERT_EQ(one[0], float(level) / 127.5f - 1);
  }
}

TEST_F(DataTest, ADamagedPngIsRefused) {
  size_t C, H, W;
  auto error = [&](const std::string& bytes) {
    return error_of([&] { read_png(put("x.png", bytes), &C, &H, &W); });
  };
  const std::string good = png_row(
      3, 8, 2, "abcdefghi", chunk("tEXt", std::string("a\0b", 3)) + chunk("gAMA", "\1\2\3\4"));
  ASSERT_EQ(error(good), "no error");
  for (size_t i = 0; i < good.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = good;
      changed[i] = char(changed[i] ^ 1 << bit);
      EXPECT_PRED_FORMAT2(testing::IsSubstring, "cannot read", error(changed)) << "byte " << i;
    }
  auto with = [&](const std::string& stream) {
    return header(3, 1, 8, 0) + chunk("IDAT", stream) + chunk("IEND", "");
  };
  std::string stream = deflated(std::string("\0abc", 4)), damaged = stream;
  damaged.back() = char(damaged.back() ^ 1);
  EXPECT_EQ(error(with(stream)), "no error");
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "incorrect data check", error(with(damaged)));
  for (size_t n = 0; n < stream.size(); ++n)
    EXPECT_NE(error(with(stream.substr(0, n))), "no error") << n;
  EXPECT_NE(error(with(deflated(std::string("\0ab", 3)))), "no error") << "too few pixels";
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "not a whole PNG",
                      error(with(deflated(std::string(1'000'000, '\0')))));
  EXPECT_NE(error(header(3, 1, 8, 0) + chunk("IEND", "")), "no error") << "no pixels";
  // A number beyond the palette, whatever greys this has.
  const std::string greys("\0\0\0\1\1\1\2\2\2", 9);
  EXPECT_EQ(error(png_row(3, 8, 3, std::string("\0\1\2", 3), chunk("PLTE", greys))), "no error");
  for (const char* row : {"\1\2\3", "\1\2\xff"})
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "number is not in its palette",
                        error(png_row(3, 8, 3, row, chunk("PLTE", greys))));
}

// Beside a row is its caption, and nothing else changes.
TEST_F(DataTest, CaptionsStandBesideTheRowsOfAGrid) {
  constexpr size_t rows = 3, columns = 2, side = 24;
  std::vector<float> images(rows * columns * 3 * side * side, level(99));
  struct Picture {
    size_t C, H, W;
    std::vector<float> pixels;
  };
  auto draw = [&](const std::vector<std::string>& captions, size_t height, size_t scale) {
    write_png_grid(at("grid.png"), images.data(),
                   {rows, columns, 3, height, side, scale, captions});
    Picture p;
    p.pixels = read_png(at("grid.png"), &p.C, &p.H, &p.W);
    return p;
  };
  for (size_t scale : {1, 2, 4}) {
    Picture bare = draw({}, side, scale), p = draw({"ankle boot", "bag", ""}, side, scale);
    ASSERT_EQ(p.H, bare.H);
    ASSERT_GT(p.W, bare.W);
    size_t left = p.W - bare.W;
    size_t ink[rows] = {}, first[rows] = {left, left, left};
    for (size_t c = 0; c < 3; ++c)
      for (size_t y = 0; y < p.H; ++y)
        for (size_t x = 0; x < p.W; ++x) {
          float v = p.pixels[(c * p.H + y) * p.W + x];
          size_t row = y / (side * scale + 2);
          float expected = x < left ? v == 1 ? 1 : -1  // black on white
                                    : bare.pixels[(c * p.H + y) * bare.W + x - left];
          ASSERT_EQ(v, expected);
          if (x < left && v != 1) ++ink[row], first[row] = std::min(first[row], x);
        }
    EXPECT_GT(ink[0], ink[1]);
    EXPECT_GT(ink[1], 0u);
    EXPECT_GT(ink[2], 0u) << "(empty)";
    EXPECT_LT(first[0], first[1]) << "a longer one begins further left";
    EXPECT_GT(first[0], 2u);
  }
  // Images lower than a line of text make room for it.
  EXPECT_EQ(draw({"g", "g", "g"}, 4, 1).H, 3 * 12 + 2 * 2u);
  EXPECT_EQ(draw({}, 4, 1).H, 3 * 4 + 2 * 2u);
  const std::string pairs[][2] = {{"a\nb\tc", "a b c"},
                                  {"größe 日本", "gr??e ??"},
                                  {"\x1b[1m\x7f", " [1m?"},
                                  {"", "(empty)"},
                                  {std::string(32, 'x'), std::string(32, 'x')},
                                  {std::string(5000, 'x'), std::string(29, 'x') + "..."}};
  for (const auto& [caption, label] : pairs) EXPECT_EQ(grid_label(caption), label);
  std::string all;
  for (int c = 1; c < 256; ++c) all += char(c);
  for (size_t i = 0; i < all.size(); i += 20) draw({all.substr(i, 20), "", ""}, side, 2);
  EXPECT_ERROR(grid_layout("x.png", {1, 1, 1, 4, 16380, 1, {"wide"}}), "more than 16384 a side");
  EXPECT_ERROR(grid_layout("x.png", {1, 1, 1, 4, 16380, 1}), "no error");
  EXPECT_ERROR(grid_layout("x.png", {2000, 1, 1, 4, 4, 1, {"high"}}), "more than 16384 a side");
}

// ---------------------------------------------------------------------------------------------
// Text

TEST(Text, TheEncoderIsFrozen) {
  // Trained weights mean nothing with another encoder: these numbers must never change.
  EXPECT_EQ(fnv1a(std::string()), 0xcbf29ce484222325u);
  EXPECT_EQ(fnv1a(std::string("foobar")), 0x85944171f73967e8u);  // from the authors of FNV
  struct {
    const char* word;
    float vector[4];
  } table[] = {{"sneaker", {0.00463763671f, 0.552132189f, 2.63904309f, -0.711263418f}},
               {"a", {-1.6831125f, -0.050274983f, -0.685537398f, -0.437625229f}},
               {"", {0.85239923f, -1.26818347f, -1.12065697f, 0.919519544f}}};
  for (const auto& row : table)
    for (size_t i = 0; i < 4; ++i)
      EXPECT_FLOAT_EQ(encode_text(row.word, 1, 4)[i], row.vector[i]) << row.word;
}

TEST(Text, WordsArePlacedInOrderAndPadded) {
  auto text = encode_text("  A photo\tOF ", 5, 3), pad = encode_text("", 1, 3);
  ASSERT_EQ(text.size(), 15u);
  const char* words[] = {"a", "photo", "of", "<pad>", "<pad>"};
  for (size_t t = 0; t < 5; ++t) {
    std::vector<float> one = encode_text(words[t], 1, 3);
    EXPECT_EQ(std::vector<float>(text.begin() + t * 3, text.begin() + t * 3 + 3), one) << t;
  }
  EXPECT_EQ(std::vector<float>(text.end() - 3, text.end()), pad);
  EXPECT_ERROR(encode_text("one two three", 2, 3), "has 3 words, but there are 2 text tokens");
  EXPECT_EQ(encode_text("one two", 2, 3).size(), 6u);
}

TEST(Text, VectorsAreStandardNormalAndDiffer) {
  constexpr size_t n = 4096;
  auto a = encode_text("sneaker", 1, n), b = encode_text("sandal", 1, n);
  double mean = 0, square = 0, product = 0;
  for (size_t i = 0; i < n; ++i)
    mean += a[i] / n, square += a[i] * a[i] / n, product += a[i] * b[i] / n;
  const double sigma = 1 / std::sqrt(double(n));
  EXPECT_NEAR(mean, 0, 4 * sigma);
  EXPECT_NEAR(square, 1, 4 * std::sqrt(2.0) * sigma);
  EXPECT_NEAR(product, 0, 4 * sigma);
}

TEST(Text, Captions) {
  const char* table[][2] = {{"sneaker", "a photo of a sneaker"},
                            {"ankle boot", "a photo of an ankle boot"},
                            {"Ankle boot", "a photo of an Ankle boot"},
                            {"a photo of a bag", "a photo of a bag"},
                            {"A Photo of two bags", "A Photo of two bags"},
                            {"a photograph", "a photo of an a photograph"},
                            {"", ""}};
  for (auto [prompt, caption] : table) EXPECT_EQ(caption_of(prompt), caption);
}

// ---------------------------------------------------------------------------------------------
// Fashion-MNIST

std::string pixels(size_t n) {
  std::string bytes;
  for (size_t i = 0; i < n * 784; ++i) bytes += char(i * 7);
  return bytes;
}

class IdxTest : public DataTest {
 protected:
  std::string gzip(const std::string& bytes) const {
    gzFile file = gzopen(at("gz").c_str(), "wb");
    gzwrite(file, bytes.data(), unsigned(bytes.size()));
    gzclose(file);
    return get(at("gz"));
  }
  // A folder with these files to train on, and two images to validate on.
  std::string folder(const std::string& images, const std::string& labels) const {
    put("idx/train-images-idx3-ubyte.gz", images);
    put("idx/train-labels-idx1-ubyte.gz", labels);
    put("idx/t10k-images-idx3-ubyte.gz", images_);
    put("idx/t10k-labels-idx1-ubyte.gz", labels_);
    return at("idx");
  }
  std::string images_ = gzip(big_endian({0x803, 2, 28, 28}) + pixels(2));
  std::string labels_ = gzip(big_endian({0x801, 2}) + "\x07\x02");
};

TEST_F(IdxTest, ReadsAndPads) {
  testing::internal::CaptureStderr();
  Dataset data = load_fashion_mnist(folder(images_, labels_), 1).train;
  EXPECT_EQ(
      testing::internal::GetCapturedStderr(),
      "note: " + at("idx") + " has other labels than Fashion-MNIST: its captions are 0 to 9\n");
  EXPECT_EQ(data.images, 2u);
  EXPECT_EQ(data.image_size(), 1024u);
  ASSERT_EQ(data.pixels.size(), 2048u);
  EXPECT_EQ(data.caption, (std::vector<int32_t>{7, 2}));
  for (size_t i = 0; i < 2048; ++i) {
    size_t n = i / 1024, h = i / 32 % 32, w = i % 32;
    bool inside = h >= 2 && h < 30 && w >= 2 && w < 30;
    size_t source = (n * 28 + h - 2) * 28 + w - 2;
    ASSERT_EQ(data.pixels[i], inside ? (source * 7 % 256) / 127.5f - 1 : -1) << i;
  }
  EXPECT_EQ(data.captions, 10u);
  ASSERT_EQ(data.text.size(), 10u * 8 * 64);
  EXPECT_EQ(std::vector<float>(data.text.begin() + 7 * 512, data.text.begin() + 8 * 512),
            encode_text("a photo of a 7", 8, 64))
      << "not a sneaker: this is not Fashion-MNIST";
  EXPECT_EQ(data.names[9], "9");
  EXPECT_EQ(data.empty_text, encode_text("", 8, 64));
  Loaded loaded = load(at("idx"));
  EXPECT_EQ(loaded.out, "4 images of 1x32x32, 10 captions, 2 held out\n");
  EXPECT_EQ(loaded.data.train.text_dim, 64u);
  EXPECT_EQ(loaded.data.held_out.caption, (std::vector<int32_t>{7, 2}));
}

TEST_F(IdxTest, DamagedFilesAreRefused) {
  auto changed = [](std::string bytes, size_t at) {
    bytes[at] = char(bytes[at] ^ 0x55);
    return bytes;
  };
  auto images = [&](std::vector<uint32_t> header, size_t n) {
    return gzip(big_endian(header) + pixels(n));
  };
  struct {
    std::string images, labels, words;
  } table[] = {
      {images_.substr(0, images_.size() / 2), labels_, "truncated"},
      {images_.substr(0, images_.size() - 4), labels_, "truncated"},
      {images_.substr(0, 12), labels_, "truncated"},
      {"", labels_, "truncated"},
      {changed(images_, images_.size() / 2), labels_, "train-images-idx3-ubyte.gz"},
      {changed(images_, images_.size() - 6), labels_, "incorrect data check"},
      {big_endian({0x803, 2, 28, 28}) + pixels(2), labels_, "not a gzip file"},
      {labels_, labels_, "magic number is 0x801"},
      {images({0x803, 0, 28, 28}, 0), labels_, "claims 0 items"},
      {images({0x803, 0xffffffff, 28, 28}, 1), labels_, "claims 4294967295 items"},
      {images({0x803, 2, 28, 29}, 2), labels_, "a side of 29, expected 28"},
      {images({0x803, 3, 28, 28}, 2), labels_, "truncated"},
      {images({0x803, 1, 28, 28}, 2), labels_, "bytes after its 1 items"},
      {images({0x803, 1, 28, 28}, 1), labels_, "has 1 images but 2 labels"},
      {images_, gzip(big_endian({0x801, 2}) + "\x07\x0a"), "label 10 of image 1"},
      {images_, images_, "magic number is 0x803"},
  };
  for (const auto& row : table) {
    std::string path = folder(row.images, row.labels);
    EXPECT_ERROR(load_fashion_mnist(path, 1), row.words);
  }
  folder(images_, labels_);
  fs::remove(at("idx/t10k-images-idx3-ubyte.gz"));
  EXPECT_ERROR(load_fashion_mnist(at("idx"), 1), "t10k-images-idx3-ubyte.gz: No such file");
}

// Refused by the labels, before an image is read.
TEST_F(IdxTest, WhatMemoryCannotHoldIsRefusedUnread) {
  std::string path = folder("no images", labels_);
  EXPECT_ERROR(load(path, size_t(1) << 40), path + " does not fit into memory: as floats");
  EXPECT_ERROR(load(path, 1), "not a gzip file");
  EXPECT_EQ(load(path, 0).data.train.images, 2u);
}

TEST(FashionMnist, HasTheKnownImages) {
  Loaded loaded;
  try {
    loaded = load("fashion-mnist");
  } catch (const Error& error) {
    GTEST_SKIP() << error.what();
  }
  EXPECT_EQ(loaded.out, "70000 images of 1x32x32, 10 captions, 10000 held out\n");
  EXPECT_EQ(loaded.err, "");
  for (bool train : {true, false}) {
    const Dataset& data = train ? loaded.data.train : loaded.data.held_out;
    EXPECT_EQ(data.names[7], "sneaker");
    EXPECT_EQ(data.text, load("fashion-mnist", 0).data.train.text);
    ASSERT_EQ(data.images, train ? 60000u : 10000u);
    std::vector<int32_t> first(data.caption.begin(), data.caption.begin() + 12);
    EXPECT_EQ(first, train ? (std::vector<int32_t>{9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9})
                           : (std::vector<int32_t>{9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5}));
    std::vector<size_t> counts(10);
    for (int32_t c : data.caption) ++counts[size_t(c)];
    EXPECT_EQ(counts, std::vector<size_t>(10, data.images / 10));
    double sum = 0;
    for (float x : data.pixels) sum += x;
    EXPECT_NEAR(sum, train ? -34529300.2 : -5742203.21, 1);
    if (!train) continue;
    const float row[] = {0, 0, 6, 0, 99, 244, 222, 220, 218, 203, 198, 221, 215, 213, 222, 220};
    for (size_t i = 0; i < std::size(row); ++i)
      EXPECT_EQ(data.pixels[14 * 32 + 10 + i], row[i] / 127.5f - 1) << i;
  }
}

// ---------------------------------------------------------------------------------------------
// Latents, folders, splits

// A data set of two images and two captions, in parts that a test may change.
struct Latents {
  std::vector<size_t> latents_shape = {2, 1, 2, 2}, text_shape = {2, 3, 2}, caption_shape = {2};
  std::vector<float> latents = {0, 1, 2, 3, 4, 5, 6, 7}, text = std::vector<float>(12, 0.5f);
  std::vector<int32_t> caption = {1, 0};
  std::string drop, extra;
  std::vector<size_t> extra_shape = {3, 2};

  std::string save(const std::string& path) const {
    SafetensorsWriter writer(path);
    if (drop != "latents") writer.declare("latents", "F32", latents_shape);
    if (drop != "text") writer.declare("text", "F32", text_shape);
    if (drop != "caption") writer.declare("caption", "I32", caption_shape);
    if (!extra.empty()) writer.declare(extra, "F32", extra_shape);
    if (drop != "latents") writer.write(latents.data(), latents.size());
    if (drop != "text") writer.write(text.data(), text.size());
    if (drop != "caption") writer.write(caption.data(), caption.size());
    if (!extra.empty()) writer.write(std::vector<float>(6, 0.25f).data(), 6);
    writer.finish();
    return path;
  }
};

TEST_F(DataTest, LoadsLatents) {
  Latents latents;
  Dataset data = load_latents(latents.save(at("x.safetensors")));
  EXPECT_EQ(std::vector<size_t>({data.images, data.channels, data.height, data.width}),
            latents.latents_shape);
  EXPECT_EQ(std::vector<size_t>({data.captions, data.text_tokens, data.text_dim}),
            latents.text_shape);
  EXPECT_EQ(data.pixels, latents.latents);
  EXPECT_EQ(data.text, latents.text);
  EXPECT_EQ(data.caption, latents.caption);
  EXPECT_EQ(data.empty_text, std::vector<float>(6, 0));
  latents.extra = "empty";
  EXPECT_EQ(load_latents(latents.save(at("x.safetensors"))).empty_text,
            std::vector<float>(6, 0.25f));
  Loaded loaded = load(at("x.safetensors"));
  EXPECT_EQ(loaded.data.train.pixels, (std::vector<float>{0, 1, 2, 3}));
  EXPECT_EQ(loaded.data.held_out.pixels, (std::vector<float>{4, 5, 6, 7}));
  EXPECT_EQ(loaded.data.held_out.caption, (std::vector<int32_t>{0}));
  EXPECT_EQ(loaded.data.train.name_of(1), "caption 1");
  EXPECT_EQ(loaded.out,
            "2 images of 1x2x2, 2 captions, 1 held out (captions that have no other image: 1)\n");
  // All but the pixels, for those who need no more.
  fs::rename(at("x.safetensors"), at("x.SafeTensors"));
  Loaded sizes = load(at("x.SafeTensors"), 0);
  EXPECT_EQ(sizes.out, loaded.out);
  EXPECT_TRUE(sizes.data.train.pixels.empty());
  EXPECT_EQ(sizes.data.held_out.caption, loaded.data.held_out.caption);
  EXPECT_EQ(sizes.data.train.text, loaded.data.train.text);
}

// Of text alone there are captions, but nothing to train on; what has images is a data set.
TEST_F(DataTest, LoadsCaptionsAlone) {
  Latents latents;
  const std::string path = at("x.safetensors");
  auto captions = [&](const std::string& name) {
    testing::internal::CaptureStdout();
    testing::internal::CaptureStderr();
    Dataset data;
    std::string error = error_of([&] { data = load_captions(name); });
    std::string out = testing::internal::GetCapturedStdout();
    out += testing::internal::GetCapturedStderr();
    return std::pair(data, error == "no error" ? out : error);
  };
  latents.drop = "latents";
  auto save = [&](const std::vector<std::string>& names) {
    SafetensorsWriter file(path);
    for (const std::string& name : names)
      file.declare(name, "F32", name == "text" ? latents.text_shape : std::vector<size_t>{3, 2});
    for (const std::string& name : names)
      file.write(name == "text" ? latents.text.data() : std::vector<float>(6, 0.25f).data(),
                 name == "text" ? latents.text.size() : 6);
    file.finish();
  };
  save({"text"});
  auto [data, said] = captions(path);
  EXPECT_EQ(data.images, 0u);
  EXPECT_EQ(std::vector<size_t>({data.captions, data.text_tokens, data.text_dim}),
            latents.text_shape);
  EXPECT_EQ(data.text, latents.text);
  EXPECT_EQ(data.empty_text, std::vector<float>(6, 0));
  EXPECT_EQ(said, "2 captions of 3 tokens of 2 numbers\nnote: " + path +
                      " has no empty (3, 2): guidance takes zeros for it\n");
  EXPECT_ERROR(load(path, 0), "tensor latents (N,C,H,W) is missing");
  save({"text", "empty"});
  EXPECT_EQ(captions(path).first.empty_text, std::vector<float>(6, 0.25f));
  EXPECT_EQ(captions(path).second, "2 captions of 3 tokens of 2 numbers\n");
  save({"text", "mask"});
  EXPECT_ERROR(load_captions(path), "unknown tensor \"mask\"");
  save({"empty"});
  EXPECT_ERROR(load_captions(path), "tensor text (M,L,d_text) is missing");
  latents.text[3] = NAN, save({"text"});
  EXPECT_ERROR(load_captions(path), "text[0, 1, 1] is nan");
  Latents whole;
  auto [all, line] = captions(whole.save(path));
  EXPECT_EQ(all.text, whole.text);
  EXPECT_EQ(all.images, 1u);
  EXPECT_EQ(line.rfind("2 images of 1x2x2, 2 captions, 1 held out", 0), 0u) << line;
  // Latents may be in several files.
  put("y.safetensors.index.json", R"({"weight_map":{"latents":"x.safetensors",)"
                                  R"("text":"x.safetensors","caption":"x.safetensors"}})");
  EXPECT_EQ(load(at("y.safetensors.index.json")).out, line);
}

// A file of N latents (4,256,256) of zeros, in bf16: a hole, which takes no room on the disk.
std::string hollow_latents(const std::string& path, size_t N) {
  const size_t text = (N << 18) * 2, caption = text + 4, end = caption + N;
  auto tensor = [](const char* name, const char* dtype, const std::string& shape, size_t begin,
                   size_t end) {
    return std::string("\"") + name + R"(":{"dtype":")" + dtype + R"(","shape":[)" + shape +
           R"(],"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
  };
  std::string n = std::to_string(N), header = "{" +
                                              tensor("latents", "BF16", n + ",4,256,256", 0, text) +
                                              "," + tensor("text", "F32", "1,1,1", text, caption) +
                                              "," + tensor("caption", "U8", n, caption, end) + "}";
  std::ofstream(path, std::ios::binary) << safetensors(header, "");
  fs::resize_file(path, 8 + header.size() + end);
  return path;
}

// Refused by what the header says, before a number is read; what needs no pixels works all the
// same.
TEST_F(DataTest, LatentsThatMemoryCannotHoldAreRefusedUnread) {
  const size_t all = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
  const size_t N = all / (sizeof(float) << 18) + 1;
  std::string path = hollow_latents(at("x.safetensors"), N), error = error_of([&] { load(path); });
  EXPECT_PRED_FORMAT2(testing::IsSubstring, path + " does not fit into memory: as floats it takes ",
                      error);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, " GB are free", error);
  char twice[32];
  std::snprintf(twice, sizeof twice, "takes %.2f GB", 2e-9 * double(N << 20));
  EXPECT_ERROR(load(path, 2), twice);
  EXPECT_EQ(load(path, 0).data.train.images, N - N / 16);
}

// A limit that nobody told of is met while reading.
TEST_F(DataTest, MemoryThatIsNotGivenIsAnError) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer takes memory of its own";
#endif
  std::string path = hollow_latents(at("x.safetensors"), 200);  // 200 MB as floats
  size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before, now;
  getrlimit(RLIMIT_AS, &before);
  now = before, now.rlim_cur = pages * size_t(sysconf(_SC_PAGESIZE)) + 100'000'000;
  setrlimit(RLIMIT_AS, &now);
  std::string error = error_of([&] { load(path); });
  setrlimit(RLIMIT_AS, &before);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "into the memory that this process may take", error);
  EXPECT_EQ(load(path).data.train.images, 188u);
}

TEST_F(DataTest, BadLatentsAreRefused) {
  struct {
    std::function<void(Latents&)> damage;
    const char* words;
  } table[] = {
      {[](Latents& l) { l.latents[6] = NAN; }, "latents[1, 0, 1, 0] is nan"},
      {[](Latents& l) { l.latents[0] = -INFINITY; }, "latents[0, 0, 0, 0] is -inf"},
      {[](Latents& l) { l.text[11] = INFINITY; }, "text[1, 2, 1] is inf"},
      {[](Latents& l) { l.caption[1] = 2; }, "caption[1] is 2, expected 0 to 1"},
      {[](Latents& l) { l.caption[0] = -1; }, "caption[0] is -1, expected 0 to 1"},
      {[](Latents& l) { l.drop = "latents"; }, "tensor latents (N,C,H,W) is missing"},
      {[](Latents& l) { l.drop = "text"; }, "tensor text (M,L,d_text) is missing"},
      {[](Latents& l) { l.drop = "caption"; }, "tensor \"caption\" of shape [2] is missing"},
      {[](Latents& l) { l.extra = "labels"; }, "unknown tensor \"labels\""},
      {[](Latents& l) { l.extra = "empty", l.extra_shape = {6}; },
       "has shape [6], expected [3, 2]"},
      {[](Latents& l) {
         l.latents_shape = {2, 4};
       },
       "latents has shape [2, 4], expected (N,C,H,W)"},
      {[](Latents& l) {
         l.text_shape = {2, 6};
       },
       "text has shape [2, 6], expected (M,L,d_text)"},
      {[](Latents& l) {
         l.caption_shape = {1, 2};
       },
       "has shape [1, 2], expected [2]"},
      {[](Latents& l) { l.caption_shape = {1}, l.caption = {0}; }, "has shape [1], expected [2]"},
      {[](Latents& l) { l.latents_shape[0] = 0, l.latents.clear(); }, "none of them 0"},
  };
  for (const auto& row : table) {
    Latents latents;
    row.damage(latents);
    std::string path = latents.save(at("x.safetensors"));
    EXPECT_ERROR(load_latents(path), row.words);
    EXPECT_ERROR(load_latents(path), path);
  }
}

TEST_F(DataTest, LatentsOfTheWrongKindAreRefused) {
  auto save = [&](const std::string& latents, const std::string& caption,
                  const std::string& bytes) {
    std::string header =
        R"({"latents":{"dtype":")" + latents + R"(","shape":[1,1,1,1],"data_offsets":[0,8]},)" +
        R"("text":{"dtype":"F64","shape":[1,1,1],"data_offsets":[8,16]},)" +
        R"("caption":{"dtype":")" + caption + R"(","shape":[1],"data_offsets":[16,24]}})";
    return put("x.safetensors", safetensors(header, bytes));
  };
  const std::string zeros(24, '\0');
  EXPECT_ERROR(load_latents(save("F64", "I64", zeros)), "no error");
  EXPECT_ERROR(load_latents(save("I64", "I64", zeros)), "\"latents\" is I64, expected a floating");
  EXPECT_ERROR(load_latents(save("F64", "F64", zeros)), "\"caption\" is F64, expected an integer");
  // Finite as it stands, but no float.
  EXPECT_ERROR(load_latents(save("F64", "I64", raw<double>({1e300, 0, 0}))), "is inf");
}

class FolderTest : public DataTest {
 protected:
  void picture(const std::string& name, float value = 0, size_t C = 1, size_t side = 4) const {
    fs::create_directories(fs::path(at(name)).parent_path());
    std::vector<float> image(C * side * side, value);
    write_png_grid(at("picture.png"), image.data(), {1, 1, C, side, side, 1});
    fs::rename(at("picture.png"), at(name));
  }
};

TEST_F(FolderTest, LoadsPicturesInOrder) {
  picture("images/sneaker/2.png", level(20), 3);
  picture("images/sneaker/10.png", level(10), 3);
  picture("images/ankle boot/1.png", level(1), 3);
  std::string passed_over;
  Dataset data = load_folder(at("images"), &passed_over);
  EXPECT_EQ(passed_over, "");
  EXPECT_EQ(data.images, 3u);
  EXPECT_EQ(std::vector<size_t>({data.channels, data.height, data.width}),
            (std::vector<size_t>{3, 4, 4}));
  EXPECT_EQ(data.captions, 2u);
  EXPECT_EQ(data.names, (std::vector<std::string>{"ankle boot", "sneaker"}));
  EXPECT_EQ(data.caption, (std::vector<int32_t>{0, 1, 1}));
  const size_t levels[] = {1, 10, 20};
  for (size_t i = 0; i < data.pixels.size(); ++i)
    ASSERT_NEAR(data.pixels[i], level(levels[i / 48]), 1e-6) << i;
  EXPECT_EQ(std::vector<float>(data.text.begin(), data.text.begin() + 8 * 64),
            encode_text("a photo of an ankle boot", 8, 64));
  Dataset sizes = load_folder(at("images"), &passed_over, 0);
  EXPECT_EQ(std::pair(sizes.images, sizes.image_size()), std::pair(size_t(3), size_t(48)));
  EXPECT_TRUE(sizes.pixels.empty());

  picture("images/trouser/1.png", 0, 3, 5);
  EXPECT_ERROR(load_folder(at("images"), &passed_over), "trouser/1.png is 3 x 5 x 5");
  picture("images/trouser/1.png", 0, 1, 4);
  EXPECT_ERROR(load_folder(at("images"), &passed_over), "trouser/1.png is 1 x 4 x 4");
  put("images/trouser/1.png", "no picture");
  EXPECT_ERROR(load_folder(at("images"), &passed_over), "trouser/1.png: it is not a whole PNG");
  fs::create_directory(at("none"));
  EXPECT_ERROR(load_folder(at("none"), &passed_over), "holds no PNG images in sub-folders");
  EXPECT_ERROR(load_folder(at("nowhere"), &passed_over), "cannot read the folder");
  picture("long/one two three four five/1.png");
  EXPECT_ERROR(load(at("long")), "9 words, but there are 8 text tokens: use fewer words");
}

// Capitals in an extension change neither what is taken nor its order.
TEST_F(FolderTest, ExtensionsMayBeInCapitals) {
  const char* names[] = {"1", "10", "2", "2.Q", "2.a", "2-", "A", "b"};
  for (bool capitals : {false, true})
    for (size_t i = 0; i < std::size(names); ++i)
      picture((capitals ? "upper/x/" : "lower/x/") + std::string(names[i]) +
                  (!capitals ? ".png"
                   : i % 2   ? ".PNG"
                             : ".Png"),
              level(i));
  Loaded lower = load(at("lower")), upper = load(at("upper"));
  EXPECT_EQ(lower.out, "8 images of 1x4x4, 1 caption, 1 held out\n");
  EXPECT_EQ(upper.out, lower.out);
  EXPECT_EQ(upper.data.train.pixels, lower.data.train.pixels);
  EXPECT_EQ(upper.data.held_out.pixels, lower.data.held_out.pixels);
}

TEST_F(FolderTest, WhatIsPassedOverIsSaid) {
  for (int i = 0; i < 20; ++i) picture("x/cat/" + std::to_string(i) + ".png");
  picture("x/dog/1.png");
  ASSERT_EQ(load(at("x")).out, "21 images of 1x4x4, 2 captions, 1 held out\n");
  const Split bare = load(at("x")).data;
  struct {
    std::function<void()> add;
    std::string words;
  } table[] = {
      {[&] { put("x/cat/notes.txt", ""), put("x/dog/1.jpg", ""); },
       ", 2 files passed over (2 not PNG, as cat/notes.txt)"},
      {[&] { put("x/cat/png", ""), put("x/cat/1.png~", ""); },
       ", 2 files passed over (2 not PNG, as cat/1.png~)"},
      {[&] { picture("x/.ipynb_checkpoints/1-checkpoint.png"), picture("x/.git/a/b/c.png"); },
       ", 2 files passed over (2 hidden, as .git/a/b/c.png)"},
      {[&] { put("x/.DS_Store", ""), put("x/cat/._1.png", ""), put("x/dog/.png", ""); },
       ", 3 files passed over (3 hidden, as .DS_Store)"},
      {[&] { picture("x/top.png"), put("x/README", ""); },
       ", 2 files passed over (2 at the top, outside the captions' folders, as README)"},
      {[&] { picture("x/cat/deep/1.png"), picture("x/cat/deep/er/1.png"); },
       ", 2 files passed over (2 deeper than a caption's folder, as cat/deep/1.png)"},
      {[&] {
         mkfifo(at("x/cat/pipe.png").c_str(), 0600),
             fs::create_symlink("/dev/zero", at("x/cat/zero.png"));
       },
       ", 2 files passed over (2 not a regular file, as cat/pipe.png)"},
      {[&] { fs::create_symlink("nowhere", at("x/cat/2b.png")); },
       ", 1 file passed over (1 not a regular file, as cat/2b.png)"},
      {[&] { fs::create_directories(at("x/bird")), fs::create_directories(at("x/axe/one")); },
       ", folders without images: axe, bird"},
      {[&] { put("x/bird/1.jpeg", ""); },
       ", folders without images: bird, 1 file passed over (1 not PNG, as bird/1.jpeg)"},
      {[&] { fs::create_symlink(".", at("x/self")), fs::create_symlink("loop", at("x/loop")); },
       ", 2 files passed over (2 at the top, outside the captions' folders, as loop)"},
      {[&] {
         fs::create_symlink("..", at("x/cat/up")), fs::create_symlink("../..", at("x/dog/up"));
       },
       ", 2 files passed over (2 deeper than a caption's folder, as cat/up)"},
      {[&] { put("x/cat/\x1b[2J\n", ""); },
       ", 1 file passed over (1 not PNG, as cat/\\x1b[2J\\x0a)"},
      {[&] { put("x/cat/notes.txt", ""), put("x/.hidden", ""), put("x/dog/a.gif", ""); },
       ", 3 files passed over (1 hidden, as .hidden; 2 not PNG, as cat/notes.txt)"},
  };
  fs::copy(at("x"), at("saved"), fs::copy_options::recursive);
  for (const auto& row : table) {
    row.add();
    Loaded loaded = load(at("x"));
    EXPECT_EQ(loaded.out, "21 images of 1x4x4, 2 captions, 1 held out" + row.words + "\n");
    EXPECT_EQ(loaded.err, "");
    EXPECT_EQ(loaded.data.train.caption, bare.train.caption);
    fs::remove_all(at("x"));
    fs::copy(at("saved"), at("x"), fs::copy_options::recursive);
  }
  fs::create_symlink("cat", at("x/kitten"));
  EXPECT_EQ(load(at("x")).data.train.names, (std::vector<std::string>{"cat", "dog", "kitten"}))
      << "a link to a folder is one";
  // Nothing to take: why is said here too.
  picture("flat/1.png"), picture("flat/a/b/1.png");
  EXPECT_ERROR(load(at("flat")), "1 deeper than a caption's folder, as a/b/1.png");
}

TEST_F(FolderTest, CaptionsOfTheSameWordsAreToldApartByNobody) {
  picture("x/Hot  dog/1.png"), picture("x/hot dog/1.png"), picture("x/\x1b/1.png");
  EXPECT_EQ(load(at("x")).err, "note: " + at("x") +
                                   "/hot dog has the same words as Hot  dog: to "
                                   "the network they are one\n");
  picture("y/ /1.png");
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "y/  has the same words as no caption",
                      load(at("y")).err);
  picture("z/cat/1.png"),
      picture(
          "z/a photo of a \x1b"
          "cat/1.png"),
      picture("z/A photo of a cat/1.png");
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "z/cat has the same words as A photo of a cat",
                      load(at("z")).err);
}

// Images (1,1,2) of n and -n, each with the caption that is given.
Dataset numbered(const std::vector<int32_t>& captions, size_t names) {
  Dataset data;
  data.images = captions.size(), data.channels = 1, data.height = 1, data.width = 2;
  data.caption = captions, data.names.resize(names), data.captions = names;
  for (size_t n = 0; n < data.images; ++n)
    data.pixels.insert(data.pixels.end(), {float(n), -float(n)});
  return data;
}
// The images' numbers, which their pixels and captions must agree on.
std::vector<size_t> numbers_of(const Dataset& data, const std::vector<int32_t>& captions) {
  std::vector<size_t> numbers;
  EXPECT_EQ(data.caption.size(), data.images);
  EXPECT_EQ(data.pixels.size(), 2 * data.images);
  for (size_t i = 0; i < data.images; ++i) {
    size_t n = size_t(data.pixels[2 * i]);
    EXPECT_EQ(data.pixels[2 * i + 1], -float(n));
    EXPECT_EQ(data.caption[i], captions[n]);
    numbers.push_back(n);
  }
  return numbers;
}

TEST(Split, EveryImageIsTrainedOnOrHeldOutAndEveryWordIsTrainedOn) {
  auto same = [](size_t n, int32_t caption = 0) { return std::vector<int32_t>(n, caption); };
  auto with = [](std::vector<int32_t> captions, std::map<size_t, int32_t> others) {
    for (auto [n, caption] : others) captions[n] = caption;
    return captions;
  };
  struct {
    std::vector<int32_t> captions;
    size_t names;
    std::vector<size_t> held_out;
    bool both = false;
  } table[] = {
      {same(1), 0, {0}, true},
      {same(2), 0, {1}},
      {same(5), 0, {4}},
      {same(16), 0, {15}},
      {same(17), 0, {15}},
      {same(40), 0, {15, 31}},
      // Captions that are numbers may be alike, and are held out whole.
      {{0, 1}, 0, {1}},
      {with(same(32), {{15, 1}}), 0, {15, 31}},
      // Words.
      {same(1), 1, {0}, true},
      {{0, 1}, 2, {1}, true},
      {same(40), 1, {15, 31}},
      {with(same(32), {{15, 1}}), 2, {14, 31}},
      {with(same(32), {{14, 1}, {15, 1}}), 2, {15, 31}},
      {with(same(32), {{15, 1}, {31, 1}}), 2, {15, 30}},
      {with(same(16), {{15, 1}, {14, 2}, {13, 3}}), 4, {12}},
      {{0, 1, 2, 3, 3}, 4, {4}},
      {{0, 0, 1, 2, 3}, 4, {1}},
      {{0, 1, 2, 3, 4}, 5, {4}, true},
  };
  for (const auto& row : table) {
    Split data = split_off(numbered(row.captions, row.names));
    std::vector<size_t> seen = numbers_of(data.train, row.captions),
                        out = numbers_of(data.held_out, row.captions);
    EXPECT_EQ(out, row.held_out);
    EXPECT_EQ(data.shared, row.both);
    if (!row.both) seen.insert(seen.end(), out.begin(), out.end());
    std::sort(seen.begin(), seen.end());
    std::vector<size_t> all(row.captions.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    EXPECT_EQ(seen, all);
  }
}

TEST_F(FolderTest, AClassOfOneImageIsTrainedOn) {
  for (int i = 0; i < 15; ++i) picture("x/cat/" + std::to_string(i) + ".png");
  picture("x/dog/1.png", level(1));
  Loaded loaded = load(at("x"));
  EXPECT_EQ(loaded.out, "16 images of 1x4x4, 2 captions, 1 held out\n");
  EXPECT_EQ(loaded.data.train.caption.back(), 1);
  picture("y/cat/1.png"), picture("y/dog/1.png");
  EXPECT_EQ(load(at("y")).out,
            "2 images of 1x4x4, 2 captions, 0 held out (none can be spared: it is "
            "validated on images that it trains on)\n");
}

TEST_F(DataTest, WhatIsNoDataSetIsRefused) {
  EXPECT_ERROR(load(at("nowhere")), "expected fashion-mnist, a .safetensors of latents");
  EXPECT_ERROR(load(put("x.txt", "x")), "expected fashion-mnist");
  EXPECT_ERROR(load(at("x.safetensors")), "No such file");
  EXPECT_ERROR(load(folder_), "holds no PNG images");
  EXPECT_ERROR(load(std::string(300, 'x')), "expected fashion-mnist");
  fs::path before = fs::current_path();
  fs::current_path(folder_);
  std::string error = error_of([] { load("fashion-mnist"); });
  fs::current_path(before);
  if (fs::exists("/usr/share/datasets/fashion-mnist")) return;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "bash data/fetch.sh", error);
}

}  // namespace
