// dataset.h - what the network is trained on: images, captions, and which goes with which.
//
// What it is: readers of three kinds of data (Fashion-MNIST, a user's own latents, a folder of
// PNGs) into one plain struct, and the frozen stand-in text encoder that makes captions numbers.
// What it is not: a loader that streams: a data set lives in memory whole, as floats.
//
// How to read it: the structs, encode_text(), and at the end the kinds that load_dataset() asks.
#pragma once

#include "png.h"

// What text there is: M captions, as numbers and, where they were words, as those.
struct Captions {
  size_t captions = 0, text_tokens = 0, text_dim = 0;
  std::vector<float> text;        // (M,L,d_text)
  std::vector<float> empty_text;  // (L,d_text), what guidance calls unconditional
  Words names;                    // (M), or none

  std::string name_of(size_t i) const {
    return names.empty() ? "caption " + std::to_string(i) : names[i];
  }
};

struct Dataset : Captions {
  size_t images = 0, channels = 0, height = 0, width = 0;
  std::vector<float> pixels;     // (N,C,H,W), or none
  std::vector<int32_t> caption;  // (N), which of the M captions an image has

  size_t image_size() const { return channels * height * width; }
};

// What is trained on, and what is validated on.
struct Split {
  Dataset train, held_out;
  bool shared = false;  // the held-out images are training images too
};

// The data set without its images.
inline Dataset without_images(const Dataset& data) {
  Dataset none;
  static_cast<Captions&>(none) = data;
  none.channels = data.channels, none.height = data.height, none.width = data.width;
  return none;
}

// Add images of `from` to `to`, which has the same captions.
inline void append_images(Dataset& to, const Dataset& from, const std::vector<size_t>& which) {
  size_t size = from.pixels.empty() ? 0 : from.image_size();
  to.pixels.reserve(to.pixels.size() + which.size() * size);
  for (size_t n : which) {
    const float* image = from.pixels.data() + n * size;
    to.pixels.insert(to.pixels.end(), image, image + size);
    to.caption.push_back(from.caption[n]);
  }
  to.images += which.size();
}

// 64-bit FNV-1a of values of up to four bytes: the same on every machine and in every build.
template <class... Values>
uint64_t fnv1a(const Values&... values) {
  uint64_t hash = 0xcbf29ce484222325u;
  auto mix = [&](const auto& all) {
    for (auto value : all) {
      uint32_t bits = 0;
      static_assert(sizeof value <= sizeof bits);
      std::memcpy(&bits, &value, sizeof value);
      hash = (hash ^ bits) * 0x100000001b3u;
    }
  };
  (mix(values), ...);
  return hash;
}

// V images at an even stride: a folder's images are sorted by caption.
inline Dataset every_nth(const Dataset& from, size_t V) {
  Dataset some = without_images(from);
  std::vector<size_t> which(V);
  for (size_t i = 0; i < V; ++i) which[i] = i * from.images / V;
  append_images(some, from, which);
  return some;
}

// What a resumed run knows its data by.
inline uint64_t hash_data(const Dataset& data) {
  return fnv1a(data.pixels, data.text, data.empty_text, data.caption);
}

// ---------------------------------------------------------------------------------------------
// 1. The text encoder
//
// A stand-in for a large frozen one: it knows nothing, but equal words get equal vectors, different
// words nearly orthogonal ones, and that is all a network needs to tell ten captions apart.

// The words of a text between white space, in lower case.
inline Words words_of(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return words_in(text);
}

// A caption as (tokens, dim): a fixed N(0,1) vector a word, then padding; "" is all padding.
// Fails if the caption has more words than `tokens`.
inline std::vector<float> encode_text(const std::string& caption, size_t tokens, size_t dim) {
  Words words = words_of(caption);
  if (words.size() > tokens)
    fail("the caption %s has %zu words, but there are %zu text tokens: use fewer words",
         printable(caption).c_str(), words.size(), tokens);
  // Padding is a word too, not zeros: the text goes through RMSNorm, whose derivative at zero is
  // 1/sqrt(eps), a thousandfold gain.
  words.resize(tokens, "<pad>");
  std::vector<float> text;
  for (const std::string& word : words)  // which decides its vector
    for (size_t i = 0; i < dim; ++i)
      text.push_back(static_cast<float>(gaussian(fnv1a(word), 0, i)));
  return text;
}

// What is encoded for a prompt: "sneaker" becomes "a photo of a sneaker". A prompt that begins with
// "a photo of", or is empty, stays as it is.
inline std::string caption_of(const std::string& prompt) {
  const std::string words = join_list(words_of(prompt), " ") + " ";
  if (words == " " || words.rfind("a photo of ", 0) == 0) return prompt;
  bool vowel = std::string("aeiou").find(words[0]) != std::string::npos;
  return (vowel ? "a photo of an " : "a photo of a ") + prompt;
}

// Fails unless `copies` of so many images, and of the text two for each, fit into memory: asked
// before they are read, or the process is killed. Two copies: as read, and where a CPU trains.
inline void require_memory(const std::string& where, const Dataset& data, size_t images,
                           size_t copies) {
  double text = double(data.captions) * double(data.text_tokens) * double(data.text_dim);
  double numbers = double(images) * double(data.image_size());
  double need = 4 * (double(copies) * numbers + 2 * double(std::max<size_t>(copies, 1)) * text);
  double free = double(Device().available());
  if (need > free)
    fail("%s does not fit into memory: as floats%s it takes %.2f GB, and %.2f GB are free",
         where.c_str(), copies > 1 ? ", read and copied to where the CPU trains," : "", 1e-9 * need,
         1e-9 * free);
}

// Fills in all that concerns text, one caption a name; see encode_text() for errors.
inline void set_captions(Captions& data, const Words& names) {
  constexpr size_t tokens = 8, dim = 64;
  data.captions = names.size(), data.text_tokens = tokens, data.text_dim = dim;
  data.names = names;
  for (const std::string& name : names) {
    std::vector<float> text = encode_text(caption_of(name), tokens, dim);
    data.text.insert(data.text.end(), text.begin(), text.end());
  }
  data.empty_text = encode_text("", tokens, dim);
}

// ---------------------------------------------------------------------------------------------
// 2. Fashion-MNIST

// The contents of a gzipped IDX file of bytes (n, sizes...): a big-endian magic number 0x0800 +
// rank, n, the sizes, the bytes. Fails unless the file is exactly that.
inline std::vector<unsigned char> read_idx(const std::string& path,
                                           const std::vector<size_t>& sizes) {
  require_regular(path);
  std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (!file) fail("cannot open %s: %s", path.c_str(), std::strerror(errno));
  // Up to `most` bytes, below 2^31; fails on fewer than `least`.
  auto read = [&](unsigned char* to, size_t most, size_t least) {
    int got = gzread(file.get(), to, unsigned(most)), status;
    const char* text = gzerror(file.get(), &status);  // begins with the path
    if (got < 0) fail("cannot read %s: fetch it again", text);
    if (status == Z_BUF_ERROR || size_t(got) < least)
      fail("%s is truncated: fetch it again", path.c_str());
    return size_t(got);
  };
  auto number = [&] {
    unsigned char b[4];
    read(b, 4, 4);
    return size_t(b[0]) << 24 | size_t(b[1]) << 16 | size_t(b[2]) << 8 | b[3];
  };
  size_t rank = sizes.size() + 1, magic = number(), count = number(), bytes = 1;
  if (gzdirect(file.get())) fail("%s is not a gzip file", path.c_str());
  if (magic != 0x0800 + rank)
    fail("%s is not an IDX file of bytes of rank %zu: its magic number is 0x%zx", path.c_str(),
         rank, magic);
  if (count == 0 || count > 1'000'000)
    fail("%s claims %zu items, expected 1 to 1000000", path.c_str(), count);
  for (size_t size : sizes) {
    size_t found = number();
    if (found != size)
      fail("%s: an item has a side of %zu, expected %zu", path.c_str(), found, size);
    bytes *= size;
  }
  std::vector<unsigned char> data(count * bytes);
  read(data.data(), data.size(), data.size());
  // Only at its end does a gzip stream show whether its checksum holds.
  unsigned char extra;
  if (read(&extra, 1, 0) > 0) fail("%s has bytes after its %zu items", path.c_str(), count);
  return data;
}

// A folder with Fashion-MNIST's four .gz files: 60,000 images to train on, 10,000 to validate on,
// (N,1,32,32): 28x28 with a black border, so that patches of 2 and of 4 fit. Of others with these
// names (MNIST's digits) a caption is its label's number, with a note. Fails on a damaged file.
inline Split load_fashion_mnist(const std::string& folder, size_t copies) {
  constexpr size_t side = 28, border = 2, padded = side + 2 * border;
  Split data;
  const std::pair<Dataset&, std::string> parts[] = {{data.train, folder + "/train"},
                                                    {data.held_out, folder + "/t10k"}};
  for (const auto& [part, prefix] : parts) {
    auto labels = read_idx(prefix + "-labels-idx1-ubyte.gz", {});
    for (size_t n = 0; n < labels.size(); ++n)
      if (labels[n] >= 10)
        fail("%s: label %d of image %zu is not below 10", folder.c_str(), labels[n], n);
    part.caption.assign(labels.begin(), labels.end());
    part.images = labels.size(), part.channels = 1, part.height = part.width = padded;
  }
  require_memory(folder, data.train, data.train.images + data.held_out.images, copies);
  for (const auto& [part, prefix] : parts) {
    if (copies == 0) break;
    auto bytes = read_idx(prefix + "-images-idx3-ubyte.gz", {side, side});
    if (bytes.size() != part.images * side * side)
      fail("%s has %zu images but %zu labels", folder.c_str(), bytes.size() / (side * side),
           part.images);
    part.pixels.assign(part.images * padded * padded, -1.0f);
    for (size_t i = 0; i < bytes.size(); ++i) {
      size_t n = i / (side * side), h = i / side % side + border, w = i % side + border;
      part.pixels[(n * padded + h) * padded + w] = bytes[i] / 127.5f - 1;
    }
  }
  Words names = {"t-shirt", "trouser", "pullover", "dress", "coat",
                 "sandal",  "shirt",   "sneaker",  "bag",   "ankle boot"};
  if (fnv1a(data.train.caption) != 0xb9f71c71bae5f277u ||
      fnv1a(data.held_out.caption) != 0x25bdf8123f06fac3u) {
    std::fprintf(stderr, "note: %s has other labels than Fashion-MNIST: its captions are 0 to 9\n",
                 visible(folder).c_str());
    for (size_t i = 0; i < names.size(); ++i) names[i] = std::to_string(i);
  }
  for (const auto& part : parts) set_captions(part.first, names);
  return data;
}

// ---------------------------------------------------------------------------------------------
// 3. Other people's data

// A floating tensor's numbers; fails on others, and on NaN and infinity.
template <class Real>
std::vector<Real> read_finite(const SafetensorsReader& file, const std::string& path,
                              const TensorInfo& tensor) {
  std::vector<Real> values = file.read<Real>(tensor);
  for (size_t i = 0; i < values.size(); ++i)
    if (!std::isfinite(double(values[i]))) {
      std::vector<size_t> at(tensor.shape.size());
      for (size_t d = at.size(), rest = i; d-- > 0; rest /= tensor.shape[d])
        at[d] = rest % tensor.shape[d];
      fail("%s: %s%s is %g, expected a finite float", path.c_str(), tensor.name.c_str(),
           shape_text(at).c_str(), double(values[i]));
    }
  return values;
}

// The shape of a tensor of a data set; `letters`: what it is to be, "(N,C,H,W)".
inline std::vector<size_t> shape_of(const SafetensorsReader& file, const std::string& path,
                                    const char* name, const std::string& letters) {
  const TensorInfo* tensor = file.find(name);
  if (!tensor) fail("%s: tensor %s %s is missing", path.c_str(), name, letters.c_str());
  auto rank = 1 + std::count(letters.begin(), letters.end(), ',');
  if (tensor->shape.size() != size_t(rank) || tensor->count() == 0)
    fail("%s: %s has shape %s, expected %s, none of them 0", path.c_str(), name,
         shape_text(tensor->shape).c_str(), letters.c_str());
  return tensor->shape;
}

// What there is of text (M,L,d_text) and, if it is there, empty (L,d_text), else zeros, once
// memory holds it and `copies` of the images that `data` has.
inline void read_text(const SafetensorsReader& file, const std::string& path, Dataset& data,
                      size_t copies) {
  auto text = shape_of(file, path, "text", "(M,L,d_text)");
  data.captions = text[0], data.text_tokens = text[1], data.text_dim = text[2];
  if (data.captions > INT32_MAX) fail("%s has more than 2^31 - 1 captions", path.c_str());
  require_memory(path, data, data.images, copies);
  data.text = read_finite<float>(file, path, *file.find("text"));
  data.empty_text.assign(data.text_tokens * data.text_dim, 0);
  if (file.find("empty"))
    data.empty_text =
        read_finite<float>(file, path, file.require("empty", {data.text_tokens, data.text_dim}));
}

// A safetensors file with latents (N,C,H,W) and text (M,L,d_text), floating, caption (N), integer
// in [0,M), and optionally empty (L,d_text), else zeros. Fails on a missing, unknown or misshapen
// tensor, a caption out of range, and NaN or infinity anywhere.
inline Dataset load_latents(const std::string& path, size_t copies = 1) {
  SafetensorsReader file(path);
  file.require_only({"latents", "text", "caption", "empty"});
  auto latents = shape_of(file, path, "latents", "(N,C,H,W)");
  Dataset data;
  data.images = latents[0], data.channels = latents[1];
  data.height = latents[2], data.width = latents[3];
  read_text(file, path, data, copies);
  auto caption = file.read<int64_t>(file.require("caption", {data.images}));
  for (size_t n = 0; n < caption.size(); ++n)
    if (caption[n] < 0 || caption[n] >= int64_t(data.captions))
      fail("%s: caption[%zu] is %lld, expected 0 to %zu", path.c_str(), n,
           static_cast<long long>(caption[n]), data.captions - 1);
  data.caption.assign(caption.begin(), caption.end());
  if (copies > 0) data.pixels = read_finite<float>(file, path, *file.find("latents"));
  return data;
}

// Names for a sentence, the first ten.
inline std::string list_of(Words names) {
  size_t all = names.size();
  if (all > 10) names.resize(10), names.push_back("... (" + std::to_string(all) + " in all)");
  return visible(join_list(names, ", "));
}

inline std::string counted(size_t n, const std::string& what) {
  return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

// The files that a reader of a folder passes over, by reason.
struct PassedOver {
  fs::path folder;
  size_t files = 0;
  std::map<std::string, std::set<std::string>> reasons;

  // A file; or all files in a folder, but not behind links in it, which may lead anywhere.
  void add(const fs::path& path, const char* reason) {
    std::error_code error;
    if (fs::is_directory(fs::symlink_status(path, error)))
      for (const auto& entry : fs::directory_iterator(path, error)) add(entry.path(), reason);
    else
      files += reasons[reason].insert(path.lexically_relative(folder)).second;
  }

  // ", 3 files passed over (2 not PNG, as cat/notes.txt; 1 hidden, as .DS_Store)", or nothing.
  std::string text() const {
    Words all;
    for (const auto& [reason, found] : reasons)
      all.push_back(std::to_string(found.size()) + " " + reason + ", as " +
                    visible(*found.begin()));
    if (all.empty()) return "";
    return ", " + counted(files, "file") + " passed over (" + join_list(all, "; ") + ")";
  }
};

// Name and path of the entries of a folder, as if .PNG were .png: the same order on every machine.
inline std::set<std::pair<std::string, fs::path>> sorted_entries(const fs::path& folder) {
  std::error_code error;
  std::set<std::pair<std::string, fs::path>> entries;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    bool png = has_extension(at->path(), ".png");
    entries.emplace((png ? at->path().stem() += ".png" : at->path().filename()), at->path());
  }
  if (error) fail("cannot read the folder %s: %s", folder.c_str(), error.message().c_str());
  return entries;
}

// PNG images of one size in sub-folders named by their captions, as in sneaker/1.png; `passed_over`
// says what else there is. Fails if there are no images, or if they differ in size or channels.
inline Dataset load_folder(const std::string& path, std::string* passed_over, size_t copies = 1) {
  PassedOver passed{path, 0, {}};
  std::vector<fs::path> files;
  Words names, without;
  Dataset data;
  std::error_code ignored;
  for (const auto& [name, folder] : sorted_entries(path)) {
    fs::path to = fs::canonical(folder, ignored), from = fs::canonical(path, ignored);
    bool circle = std::mismatch(to.begin(), to.end(), from.begin(), from.end()).first == to.end();
    if (name[0] == '.' || circle || !fs::is_directory(folder, ignored)) {
      passed.add(folder, name[0] == '.' ? "hidden" : "at the top, outside the captions' folders");
      continue;
    }
    size_t before = files.size();
    for (const auto& [key, file] : sorted_entries(folder)) {
      const char* reason = key[0] == '.'                         ? "hidden"
                           : fs::is_directory(file, ignored)     ? "deeper than a caption's folder"
                           : !has_extension(file, ".png")        ? "not PNG"
                           : !fs::is_regular_file(file, ignored) ? "not a regular file"
                                                                 : nullptr;
      if (reason) passed.add(file, reason);
      if (!reason) files.push_back(file), data.caption.push_back(int32_t(names.size()));
    }
    (files.size() > before ? names : without).push_back(folder.filename());
  }
  *passed_over = passed.text();
  if (!without.empty())
    *passed_over = ", folders without images: " + list_of(without) + *passed_over;
  if (files.empty())
    fail("%s holds no PNG images in sub-folders named by their captions, as in %s/sneaker/1.png%s",
         path.c_str(), path.c_str(), passed_over->c_str());
  set_captions(data, names);
  std::map<Words, std::string> known = {{{}, "no caption"}};
  for (const std::string& name : names) {
    auto [other, is_new] = known.emplace(words_of(caption_of(name)), name);
    if (!is_new)
      std::fprintf(stderr, "note: %s/%s has the same words as %s: to the network they are one\n",
                   visible(path).c_str(), visible(name).c_str(), visible(other->second).c_str());
  }
  for (const fs::path& file : files) {
    size_t C, H, W;
    std::vector<float> image = read_png(file, &C, &H, &W);
    if (data.images++ == 0) {
      data.channels = C, data.height = H, data.width = W;
      require_memory(path, data, files.size(), copies);
      if (copies == 0) break;
      data.pixels.reserve(files.size() * data.image_size());
    }
    if (C != data.channels || H != data.height || W != data.width)
      fail("%s is %zu x %zu x %zu (channels, height, width), those before it %zu x %zu x %zu",
           file.c_str(), C, H, W, data.channels, data.height, data.width);
    data.pixels.insert(data.pixels.end(), image.begin(), image.end());
  }
  data.images = files.size();
  return data;
}

// Holds every 16th image (every N-th of N < 16) out, to validate on. Where that would leave a
// caption of words without an image, to be never learned, it takes the last one before that can be
// spared. (Captions that are numbers may be alike.) If there is none, all are trained on as well.
inline Split split_off(Dataset all) {
  Split split{std::move(all), {}, false};
  Dataset& data = split.train;
  size_t stride = std::min<size_t>(16, data.images), size = data.image_size(), kept = 0;
  std::vector<size_t> taken, every;
  std::map<int32_t, size_t> left;
  for (int32_t c : data.caption) ++left[c];
  for (size_t n = stride - 1; n < data.images; n += stride) {
    every.push_back(n);
    for (size_t k = n; k + stride > n && data.images > 1; --k) {
      size_t& others = left[data.caption[k]];
      if (others == 1 && !data.names.empty()) continue;
      --others, taken.push_back(k);
      break;
    }
  }
  split.held_out = without_images(data);
  append_images(split.held_out, data, taken.empty() ? every : taken);
  split.shared = taken.empty();
  for (size_t n = 0; n < data.images; ++n) {
    if (std::binary_search(taken.begin(), taken.end(), n)) continue;
    if (!data.pixels.empty())
      std::copy_n(data.pixels.begin() + n * size, size, data.pixels.begin() + kept * size);
    data.caption[kept++] = data.caption[n];
  }
  data.images = kept;
  data.pixels.resize(data.pixels.empty() ? 0 : kept * size);
  data.caption.resize(kept);
  return split;
}

// ---------------------------------------------------------------------------------------------
// 4. The kinds of data sets
//
// A kind is a struct as these, and a call in each_data_kind() behind them: what --data takes, its
// help and its errors follow. One that lacks a member does not compile. load() adds to `remark`
// what belongs into the line that says what there is.

struct FashionMnist {  // by its name, or any folder with files of its names
  static constexpr const char* about = "fashion-mnist";  // what --data takes

  static bool is_in(const std::string& folder) {
    return access((folder + "/train-images-idx3-ubyte.gz").c_str(), F_OK) == 0;
  }
  static std::string folder(const std::string& where) {
    const std::string fetched = "data/downloads", installed = "/usr/share/datasets/fashion-mnist";
    return where != about ? where : is_in(fetched) || !is_in(installed) ? fetched : installed;
  }
  static bool matches(const std::string& where) { return where == about || is_in(where); }
  static Split load(const std::string& where, size_t copies, std::string&) {
    if (!is_in(folder(where)))
      fail("Fashion-MNIST is not here: run `bash data/fetch.sh`, which fetches it");
    return load_fashion_mnist(folder(where), copies);
  }
};

struct Latents {
  static constexpr const char* about = "a .safetensors of latents";

  static bool matches(const std::string& where) {
    return has_extension(where, ".safetensors") || is_index(where);
  }
  static Split load(const std::string& where, size_t copies, std::string&) {
    return split_off(load_latents(where, copies));
  }
};

struct Pictures {
  static constexpr const char* about = "a folder of PNGs";

  static bool matches(const std::string& where) {
    std::error_code ignored;
    return fs::is_directory(where, ignored);
  }
  static Split load(const std::string& where, size_t copies, std::string& remark) {
    return split_off(load_folder(where, &remark, copies));
  }
};

template <class F>
void each_data_kind(const F& f) {
  f(FashionMnist()), f(Latents()), f(Pictures());
}

inline std::string about_data() {
  Words all;
  each_data_kind([&](auto kind) { all.push_back(kind.about); });
  return join_list(all, ", ");
}

// Loads what is there, and prints a line that says what that is. `copies`: how many of the images
// memory must hold; 0: all but the pixels is loaded. Fails if there is nothing, or no room.
inline Split load_dataset(const std::string& where, size_t copies) {
  Split data;
  std::string passed_over;
  bool found = false;
  try {
    each_data_kind([&](auto kind) {
      if (found || !kind.matches(where)) return;  // the first that matches is it
      data = kind.load(where, copies, passed_over);
      found = true;
    });
    if (!found) fail("no data at %s: expected %s", where.c_str(), about_data().c_str());
  } catch (const std::bad_alloc&) {  // a limit that Device::available() does not know
    fail("%s does not fit into the memory that this process may take", where.c_str());
  }
  const Dataset &train = data.train, &held_out = data.held_out;
  std::set<int32_t> unseen(held_out.caption.begin(), held_out.caption.end());
  for (int32_t c : train.caption) unseen.erase(c);
  size_t held = data.shared ? 0 : held_out.images;
  std::string remark;
  if (data.shared) remark = " (none can be spared: it is validated on images that it trains on)";
  if (!unseen.empty())
    remark = " (captions that have no other image: " + std::to_string(unseen.size()) + ")";
  std::printf("%s of %zux%zux%zu, %s, %zu held out%s%s\n",
              counted(train.images + held, "image").c_str(), train.channels, train.height,
              train.width, counted(train.captions, "caption").c_str(), held, remark.c_str(),
              passed_over.c_str());
  return data;
}

// The captions of a data set; or of a safetensors file of text (M,L,d_text) and, for guidance,
// empty (L,d_text) alone, which has no images. Fails on what else there is.
inline Dataset load_captions(const std::string& where) {
  if (!Latents::matches(where) || SafetensorsReader(where).find("latents"))
    return load_dataset(where, 0).train;
  SafetensorsReader file(where);
  file.require_only({"text", "empty"});
  Dataset data;
  read_text(file, where, data, 0);
  std::printf("%s of %s of %s\n", counted(data.captions, "caption").c_str(),
              counted(data.text_tokens, "token").c_str(), counted(data.text_dim, "number").c_str());
  if (!file.find("empty"))
    std::fprintf(stderr, "note: %s has no empty (%zu, %zu): guidance takes zeros for it\n",
                 visible(where).c_str(), data.text_tokens, data.text_dim);
  return data;
}
