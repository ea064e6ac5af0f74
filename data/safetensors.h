// safetensors.h - weights, states and latents on disk.
//
// What it is: a reader and a writer of the safetensors format, which is 8 bytes of header length
// (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the raw numbers; the
// reader takes several files with an index for one. And SafeFile, by which every file of this
// project is written whole or not at all.
// What it is not: a container in memory. Both stream: a 100 GB file takes a 1 MB buffer.
//
// How to read it: section 1 is what a full disk meets, section 3 what a hostile file meets. A
// reader that exists has checked everything but the numbers themselves, so nobody checks again.
// Every failure is an Error (see math.h): one sentence that names the file.
#pragma once

#include "../math.h"

#include <cerrno>
#include <filesystem>
#include <functional>
#include <map>
#include <iterator>
#include <optional>
#include <set>
#include <sstream>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>

namespace fs = std::filesystem;
using Words = std::vector<std::string>;  // or names, or other texts

// ---------------------------------------------------------------------------------------------
// 1. Whole files or none

using File = std::unique_ptr<FILE, int (*)(FILE*)>;  // open

// A lock on an open file or folder, held until the descriptor is closed: it dies with its process.
// False if another process holds it. A file system that has no locks grants every one.
inline bool lock_file(int descriptor) {
  return flock(descriptor, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
}

// A file that appears under its name only when complete: bytes go to PATH.tmp beside it, which
// commit() flushes to the disk and renames. Without a commit, and after any error, PATH is what it
// was and PATH.tmp is gone. One process at a time writes to PATH.
class SafeFile {
 public:
  // Opens PATH.tmp; fails if another process writes there, or if fewer than `bytes` are free.
  explicit SafeFile(const std::string& path, uint64_t bytes = 0) : path_(path) {
    std::error_code error;
    // The link stays, what it leads to is replaced.
    if (fs::is_symlink(path, error)) path_ = fs::weakly_canonical(path, error);
    temporary_ = path_ + ".tmp";
    // A rename would replace a device such as /dev/null by a plain file.
    if (fs::exists(path, error) && !fs::is_regular_file(path, error))
      fail("cannot write %s: it exists and is not a regular file", path.c_str());
    open_temporary();
    auto available = fs::space(temporary_, error).available;
    if (!error && available < bytes) {
      abandon();
      fail("cannot write %s: it needs %zu bytes and the disk has %zu available", path.c_str(),
           size_t(bytes), size_t(available));
    }
  }
  ~SafeFile() { abandon(); }

  // Appends `bytes` bytes; fails if the disk does not take them.
  void write(const void* data, size_t bytes) {
    if (!file_) fail("cannot write %s: it is closed already", path_.c_str());
    if (bytes && std::fwrite(data, 1, bytes, file_.get()) != bytes) give_up(errno);
  }
  void write(const std::string& text) { write(text.data(), text.size()); }

  // Makes the file appear under its name, after its bytes have reached the disk.
  void commit() {
    if (!file_) fail("cannot write %s: it is closed already", path_.c_str());
    if (std::fflush(file_.get()) != 0 || fsync(fileno(file_.get())) != 0 ||
        std::rename(temporary_.c_str(), path_.c_str()) != 0)
      give_up(errno);
    file_.reset();
    flush_directory();
  }

  // Gives the new contents up and leaves PATH as it was; nothing to do after a commit.
  void abandon() {
    if (!file_) return;
    std::remove(temporary_.c_str());  // while it is locked
    file_.reset();
  }

 private:
  // What a killed process left of PATH.tmp is written over. Between opening and locking it another
  // process may have given it its name: a file of that name must be the one that is locked.
  void open_temporary() {
    struct stat locked, named;
    do {
      int descriptor =
          open(temporary_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
      if (descriptor < 0 && errno == ELOOP)
        fail("cannot write %s: the link %s is in the way", path_.c_str(), temporary_.c_str());
      if (descriptor < 0) give_up(errno);
      file_.reset(fdopen(descriptor, "wb"));
      if (!lock_file(descriptor))
        fail("cannot write %s: another process is writing it; wait for it, or choose another name",
             path_.c_str());
      if (fstat(descriptor, &locked) != 0) give_up(errno);
      if (!S_ISREG(locked.st_mode))
        fail("cannot write %s: %s is in the way and is no regular file", path_.c_str(),
             temporary_.c_str());
    } while (stat(temporary_.c_str(), &named) != 0 || named.st_ino != locked.st_ino);
    if (locked.st_size > 0 && ftruncate(fileno(file_.get()), 0) != 0) give_up(errno);
  }
  [[noreturn]] void give_up(int reason) {
    abandon();
    fail("cannot write %s: %s; what was there before is unchanged, so %s and try again",
         path_.c_str(), std::strerror(reason),
         reason == ENOENT                                          ? "create its directory"
         : reason == ENOSPC || reason == EDQUOT || reason == EFBIG ? "make room"
                                                                   : "choose another place");
  }
  // The new name lives in the directory: a power cut could undo it until that is flushed as well.
  // Where a directory cannot be opened or flushed there is nothing more that we could do.
  void flush_directory() const {
    auto parent = fs::path(path_).parent_path();
    File directory(std::fopen(parent.empty() ? "." : parent.c_str(), "re"), std::fclose);
    if (directory && fsync(fileno(directory.get())) != 0 && (errno == EIO || errno == ENOSPC))
      fail("%s was written, but its directory did not reach the disk: %s", path_.c_str(),
           std::strerror(errno));
  }

  std::string path_, temporary_;
  File file_{nullptr, std::fclose};
};

// ---------------------------------------------------------------------------------------------
// 2. The types of numbers

// IEEE half precision, read only: nothing here writes it.
struct f16 {
  uint16_t bits;

  operator float() const {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(float(mantissa), -24)  // subnormal
                                      : std::ldexp(float(1024 + mantissa), exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
  }
};
enum class bool8 : uint8_t {};  // a bool may hold 0 and 1 only; a byte of a file may hold anything

template <class Number>
constexpr bool is_floating =
    std::is_floating_point_v<Number> || std::is_same_v<Number, f16> || std::is_same_v<Number, bf16>;

// Call f(name, number) for each dtype.
template <class F>
void each_dtype(const F& f) {
  f("F64", double()), f("F32", float()), f("F16", f16()), f("BF16", bf16());
  f("I64", int64_t()), f("I32", int32_t()), f("I16", int16_t()), f("I8", int8_t());
  f("U64", uint64_t()), f("U32", uint32_t()), f("U16", uint16_t()), f("U8", uint8_t());
  f("BOOL", bool8());
}

// The safetensors name of Number: dtype_name<float>() is "F32".
template <class Number>
const char* dtype_name() {
  const char* found = "none";
  each_dtype([&](const char* name, auto x) {
    if (std::is_same_v<std::remove_const_t<Number>, decltype(x)>) found = name;
  });
  return found;
}

// Bytes of a tensor, by default of one number; nothing beyond 64 bits, or of an unknown dtype.
inline std::optional<size_t> tensor_bytes(const std::string& dtype,
                                          const std::vector<size_t>& shape = {}) {
  size_t bytes = 0;
  each_dtype([&](const char* name, auto x) {
    if (dtype == name) bytes = sizeof x;
  });
  if (bytes == 0) return {};
  for (size_t n : shape)
    if (__builtin_mul_overflow(bytes, n, &bytes)) return {};
  return bytes;
}

template <class Container>
std::string join_list(const Container& words, const char* between = ",") {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : between) + word;
  return text;
}

// "[2, 3]"
inline std::string shape_text(const std::vector<size_t>& shape) {
  std::string text;
  for (size_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

// A name out of a file, fit for a sentence: in quotes, visible and cut, for it may hold anything.
inline std::string printable(const std::string& name) {
  using nlohmann::json;
  return visible(json(name.size() <= 200 ? name : name.substr(0, 200) + "...")
                     .dump(-1, ' ', false, json::error_handler_t::replace));
}

// ---------------------------------------------------------------------------------------------
// 3. Reading

constexpr size_t largest_header = 100'000'000;  // bytes, as the authors of the format have it

// Fails on what is there and is no file: a pipe may wait for ever, a device go on for ever.
inline void require_regular(const std::string& path) {
  std::error_code error;
  if (fs::exists(path, error) && !fs::is_regular_file(path, error))
    fail("cannot read %s: it is not a regular file", path.c_str());
}

struct TensorInfo {
  std::string name, dtype;
  std::vector<size_t> shape;
  size_t begin, end;  // bytes, from the end of the header

  size_t count() const { return (end - begin) / *tensor_bytes(dtype); }
};

// The words of a text between white space.
inline Words words_in(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

// Does the name end so, in small letters or capitals?
inline bool has_extension(const fs::path& path, const char* extension) {
  return strcasecmp(path.extension().c_str(), extension) == 0;
}

inline bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Does the name end as that of an index, {"weight_map": {tensor: file beside the index}}?
inline bool is_index(const std::string& path) { return ends_with(path, ".safetensors.index.json"); }

class SafetensorsReader {
  using Json = nlohmann::json;

 public:
  // Opens and validates a file, or all that an index names; fails unless every byte of a file, and
  // every tensor of an index, is accounted for.
  explicit SafetensorsReader(const std::string& path) : path_(path) {
    require_regular(path);
    file_.reset(std::fopen(path.c_str(), "rb"));
    if (!file_) fail("cannot open %s: %s", path.c_str(), std::strerror(errno));
    size_t size = fs::file_size(path);
    if (is_index(path)) {
      open_shards(size);
    } else {
      auto take = [&](const std::string& name, const Json& entry) {
        if (name == "__metadata__")
          parse_metadata(entry);
        else
          tensors_.push_back(parse_tensor(name, entry));
      };
      const Json rest = parse_object(read_header(size), "the header", take);
      for (const auto& [name, entry] : rest.items()) take(name, entry);  // what is no object
      check_layout(size - data_start_);
    }
    for (size_t i = 0; i < tensors_.size(); ++i) index_[tensors_[i].name] = i;
  }

  // All tensors, in the order of their bytes; of an index, file by file.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }

  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // The tensor of that name, or null.
  const TensorInfo* find(const std::string& name) const {
    auto at = index_.find(name);
    return at == index_.end() ? nullptr : &tensors_[at->second];
  }

  // The tensor of that name and shape; fails if the file lacks it or has it in another shape.
  const TensorInfo& require(const std::string& name, const std::vector<size_t>& shape) const {
    const TensorInfo* tensor = find(name);
    if (!tensor)
      reject("tensor " + printable(name) + " of shape " + shape_text(shape) + " is missing");
    if (tensor->shape != shape)
      reject("tensor " + printable(name) + " has shape " + shape_text(tensor->shape) +
             ", expected " + shape_text(shape));
    return *tensor;
  }

  // Fails if the file holds a tensor that is not among `names`.
  void require_only(const std::set<std::string>& names) const {
    for (const TensorInfo& tensor : tensors_)
      if (!names.count(tensor.name)) reject("unknown tensor " + printable(tensor.name));
  }

  // Numbers [first, first + count) of a tensor into out: double, float and bf16 take every floating
  // dtype (rounding to nearest), int64_t every integer one, int16_t its own. Fails on other ones.
  template <class Number>
  void read(const TensorInfo& tensor, Number* out, size_t first, size_t count) const {
    if (first > tensor.count() || count > tensor.count() - first)
      reject("numbers " + std::to_string(first) + " to " + std::to_string(first + count) +
             " of tensor " + printable(tensor.name) + " lie outside it");
    for (const auto& [file, shard] : shards_)
      if (shard->find(tensor.name)) return shard->read(tensor, out, first, count);
    each_dtype([&](const char* name, auto source) {
      if (tensor.dtype == name) read_as<decltype(source)>(tensor, out, first, count);
    });
  }

  // All of them.
  template <class Number>
  std::vector<Number> read(const TensorInfo& tensor) const {
    std::vector<Number> out(tensor.count());
    read(tensor, out.data(), 0, out.size());
    return out;
  }

 private:
  [[noreturn]] void reject(const std::string& what) const {
    fail("%s: %s", path_.c_str(), what.c_str());
  }

  void read_bytes(size_t offset, void* out, size_t bytes) const {
    for (char* to = static_cast<char*>(out); bytes > 0;) {
      ssize_t got = pread(fileno(file_.get()), to, bytes, off_t(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) reject(std::string("cannot read: ") + std::strerror(errno));
      if (got == 0) reject("the file became shorter while it was read");
      to += got, offset += size_t(got), bytes -= size_t(got);
    }
  }

  template <class Source, class Number>
  void read_as(const TensorInfo& tensor, Number* out, size_t first, size_t count) const {
    static_assert(sizeof(Number) == 8 || std::is_same_v<Number, int16_t> || is_floating<Number>);
    size_t offset = data_start_ + tensor.begin + first * sizeof(Source);
    if constexpr (std::is_same_v<Source, Number>) {
      read_bytes(offset, out, count * sizeof(Number));
    } else if constexpr (is_floating<Source> != is_floating<Number> ||
                         std::is_same_v<Number, int16_t>) {
      reject("tensor " + printable(tensor.name) + " is " + tensor.dtype + ", expected " +
             (is_floating<Number>               ? "a floating dtype"
              : std::is_same_v<Number, int16_t> ? "the I16 dtype"
                                                : "an integer dtype"));
    } else {
      std::vector<Source> buffer(std::min<size_t>(count, (1 << 20) / sizeof(Source)));
      for (size_t n; count > 0; count -= n, out += n, offset += n * sizeof(Source)) {
        n = std::min(count, buffer.size());
        read_bytes(offset, buffer.data(), n * sizeof(Source));
        for (size_t i = 0; i < n; ++i) {
          if constexpr (std::is_same_v<Source, uint64_t>)
            if (buffer[i] > INT64_MAX)
              reject("tensor " + printable(tensor.name) + " holds " + std::to_string(buffer[i]) +
                     ", more than a signed 64-bit integer does");
          if constexpr (std::is_same_v<Number, bf16>)
            out[i] = bf16(static_cast<float>(buffer[i]));
          else
            out[i] = static_cast<Number>(buffer[i]);
        }
      }
    }
  }

  // The header's text. Its length comes from the file, so it is believed only within bounds.
  std::string read_header(size_t size) {
    uint64_t length = 0;
    if (size < sizeof length)
      reject("not a safetensors file: it has " + std::to_string(size) +
             " bytes, expected 8 or more");
    read_bytes(0, &length, sizeof length);
    if (length > largest_header)
      reject("not a safetensors file: its header claims " + std::to_string(length) +
             " bytes, expected at most " + std::to_string(largest_header));
    if (length > size - sizeof length)
      reject("truncated: its header claims " + std::to_string(length) + " bytes, but only " +
             std::to_string(size - sizeof length) + " follow");
    data_start_ = sizeof length + size_t(length);
    std::string text(size_t(length), ' ');
    read_bytes(sizeof length, text.data(), text.size());
    return text;
  }

  using Take = std::function<void(const std::string&, const Json&)>;

  // Parses a text that must be one JSON object; `what` names it in errors. Where there is a `take`
  // each object in it is given to that and left out of the result. (With a watch the library goes
  // through all that it holds at the end of each object: minutes for a hundred thousand tensors.)
  Json parse_object(const std::string& text, const std::string& what,
                    const Take& take = nullptr) const {
    // The library keeps the last of two equal keys and nests without limit: look while it parses.
    std::vector<std::set<std::string>> keys;
    std::string name;
    auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
      if (depth > 2 &&
          (event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start))
        reject(what + " nests deeper than a shape in a tensor");
      if (event == Json::parse_event_t::object_start) keys.emplace_back();
      if (event == Json::parse_event_t::object_end) keys.pop_back();
      if (event == Json::parse_event_t::key && !keys.back().insert(value).second)
        reject(what + " has " + printable(value) + " twice");
      if (event == Json::parse_event_t::key && depth == 1) name = value;  // of a tensor
      bool taken = take && depth == 1 && event == Json::parse_event_t::object_end;
      if (taken) take(name, value);
      return !taken;  // false: the library drops it
    };
    try {
      Json object = Json::parse(text, watch);
      if (text[0] == '{') return object;
    } catch (const Json::parse_error& error) {
      reject(what + " is not valid JSON at its byte " + std::to_string(error.byte));
    } catch (const Json::exception&) {
      reject(what + " is not valid JSON: a number in it is out of range");
    }
    reject(what + " is not a JSON object that begins with {");
  }

  // Opens the files of an index of `size` bytes. What each says of itself must not contradict.
  void open_shards(size_t size) {
    if (size > largest_header) reject("the index has more than 100 MB");
    std::string text(size, ' ');
    read_bytes(0, text.data(), size);
    const Json index = parse_object(text, "the index"), map = index.value("weight_map", Json());
    if (!map.is_object()) reject("the index has no weight_map, {tensor: file}");
    for (const auto& [name, file] : map.items()) {
      if (!file.is_string()) reject("the file of tensor " + printable(name) + " is not a string");
      const std::string shard = file;
      // Beside the index, nowhere else; and no index, which may name itself.
      if (shard.find('/') != std::string::npos || shard.find('\0') != std::string::npos ||
          fs::path(shard).extension() != ".safetensors")
        reject("tensor " + printable(name) + " is said to be in " + printable(shard) +
               ", expected the name of a .safetensors beside the index");
      auto& reader = shards_[shard];
      if (!reader)
        reader = std::make_unique<SafetensorsReader>(fs::path(path_).replace_filename(shard));
      if (!reader->find(name)) reject("tensor " + printable(name) + " is not in " + shard);
    }
    for (const auto& [shard, reader] : shards_) {
      for (const TensorInfo& tensor : reader->tensors()) {
        if (map.value(tensor.name, "") != shard)
          reject(shard + " holds tensor " + printable(tensor.name) +
                 ", which the index does not place there");
        tensors_.push_back(tensor);
      }
      for (const auto& [key, value] : reader->metadata())
        if (metadata_.emplace(key, value).first->second != value)
          reject("its files contradict each other in metadata " + printable(key));
    }
  }

  void parse_metadata(const Json& entry) {
    if (entry.is_null()) return;  // as absent, for the format's own library
    if (!entry.is_object()) reject("__metadata__ is not a JSON object");
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) reject("__metadata__ " + printable(key) + " is not a string");
      metadata_[key] = value;
    }
  }

  TensorInfo parse_tensor(const std::string& name, const Json& entry) const {
    const std::string tensor = "tensor " + printable(name);
    if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") ||
        !entry.contains("shape") || !entry.contains("data_offsets"))
      reject(tensor + " must have exactly dtype, shape and data_offsets");
    auto sizes = [&](const char* key) {
      bool good = entry[key].is_array();
      for (const Json& n : entry[key]) good = good && n.is_number_unsigned();
      if (!good) reject(tensor + ": " + key + " is not a list of non-negative integers");
      return entry[key].get<std::vector<size_t>>();
    };
    if (!entry["dtype"].is_string() || !tensor_bytes(entry["dtype"]))
      reject(tensor + " has an unknown dtype, expected F64, F32, F16, BF16, an integer or BOOL");
    std::vector<size_t> shape = sizes("shape"), offsets = sizes("data_offsets");
    if (offsets.size() != 2 || offsets[0] > offsets[1])
      reject(tensor + ": data_offsets is " + shape_text(offsets) + ", expected [begin, end]");
    auto bytes = tensor_bytes(entry["dtype"], shape);
    if (!bytes) reject(tensor + ": the product of its shape overflows 64 bits");
    if (*bytes != offsets[1] - offsets[0])
      reject(tensor + ": its dtype and shape need " + std::to_string(*bytes) +
             " bytes, its offsets span " + std::to_string(offsets[1] - offsets[0]));
    return {name, entry["dtype"], shape, offsets[0], offsets[1]};
  }

  // Sorts the tensors by their bytes, which must cover [0, data_bytes) exactly once.
  void check_layout(size_t data_bytes) {
    std::stable_sort(tensors_.begin(), tensors_.end(), [](const auto& a, const auto& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    size_t end = 0;
    for (const TensorInfo& tensor : tensors_) {
      if (tensor.begin != end)
        reject("tensor " + printable(tensor.name) + " begins at byte " +
               std::to_string(tensor.begin) + ", expected " + std::to_string(end) +
               ": the offsets " + (tensor.begin < end ? "overlap" : "leave a hole"));
      end = tensor.end;
    }
    if (end != data_bytes)
      reject((end > data_bytes ? "truncated: " : "bytes after the last tensor: ") +
             std::string("it has ") + std::to_string(data_bytes) + " bytes of data, expected " +
             std::to_string(end));
  }

  std::string path_;
  File file_{nullptr, std::fclose};
  size_t data_start_ = 0;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, size_t> index_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, std::unique_ptr<SafetensorsReader>> shards_;  // of an index, by file
};

// ---------------------------------------------------------------------------------------------
// 4. Writing

// Declare every tensor, write their numbers in the same order, finish. Declare wide types first:
// then every tensor lies at a multiple of its own size, which readers that map the file like.
class SafetensorsWriter {
 public:
  // Touches no file yet: the size is known only after the last declare().
  explicit SafetensorsWriter(std::string path, std::map<std::string, std::string> metadata = {})
      : path_(std::move(path)) {
    if (!metadata.empty()) header_["__metadata__"] = std::move(metadata);
  }

  // Adds a tensor; fails on a repeated name, an unknown dtype, or more bytes than 64 bits count.
  void declare(const std::string& name, const std::string& dtype,
               const std::vector<size_t>& shape) {
    if (file_) reject("tensor " + printable(name) + " is declared after the first write");
    if (name == "__metadata__" || header_.contains(name))
      reject("tensor " + printable(name) + " cannot be declared: the name is taken");
    auto bytes = tensor_bytes(dtype, shape);
    size_t end = 0;
    if (!bytes || __builtin_add_overflow(total_, *bytes, &end) || end > INT64_MAX / 2)
      reject("tensor " + printable(name) + " has an unknown dtype or is too large");
    header_[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {total_, end}}};
    tensors_.push_back({name, dtype, shape, total_, end});
    total_ = end;
  }

  // Appends the next `count` numbers of the current tensor, all or a piece of it, as they are;
  // fails on another dtype than was declared, on too many, or if the disk does not take them.
  template <class Number>
  void write(const Number* data, size_t count) {
    if (!file_) begin();
    while (current_ < tensors_.size() && tensors_[current_].end == written_) ++current_;
    if (count == 0) return;
    if (current_ == tensors_.size()) reject("more numbers are written than were declared");
    const TensorInfo& tensor = tensors_[current_];
    if (tensor.dtype != dtype_name<Number>())
      reject("tensor " + printable(tensor.name) + " is declared " + tensor.dtype + ", not " +
             dtype_name<Number>());
    if (count > (tensor.end - written_) / sizeof(Number))
      reject("tensor " + printable(tensor.name) + " gets more numbers than " +
             shape_text(tensor.shape) + " holds");
    file_->write(data, count * sizeof(Number));
    written_ += count * sizeof(Number);
  }

  // Makes the file appear; fails if a declared number was not written.
  void finish() {
    if (!file_) begin();
    if (written_ != total_)
      reject("only " + std::to_string(written_) + " of " + std::to_string(total_) +
             " declared bytes were written");
    file_->commit();
  }

 private:
  [[noreturn]] void reject(const std::string& what) {
    if (file_) file_->abandon();
    fail("cannot write %s: %s", path_.c_str(), what.c_str());
  }

  void begin() {
    std::string text;
    try {
      text = header_.dump();
    } catch (const nlohmann::json::exception&) {
      reject("a name or a metadata string is not UTF-8");
    }
    text.resize(round_up(text.size(), 8), ' ');  // so that the data begins at a multiple of 8
    uint64_t length = text.size();
    if (length > largest_header)
      reject("its header has " + std::to_string(length) + " bytes and readers take at most " +
             std::to_string(largest_header) + ": declare fewer tensors, or shorter names");
    file_.emplace(path_, sizeof length + length + total_);
    file_->write(&length, sizeof length);
    file_->write(text);
  }

  std::string path_;
  nlohmann::json header_ = nlohmann::json::object();
  std::vector<TensorInfo> tensors_;
  std::optional<SafeFile> file_;
  size_t total_ = 0, written_ = 0, current_ = 0;
};
