// dataset.h - what the network is trained on: images, captions, and which goes with which.
//
// What it is: readers of three kinds of data (Fashion-MNIST, a user's own latents, a folder of
// PNGs) into one plain struct, and the frozen stand-in text encoder that makes captions numbers.
// What it is not: a loader that streams: a data set lives in memory whole, as floats.
//
// How to read it: the struct, then encode_text(), then load_dataset() at the end, which picks a
// reader. Bad data is an Error (see math.h): one sentence that names the file and what is wrong.
#pragma once

#include "png.h"

#include <zlib.h>

struct Dataset {
  size_t images = 0, channels = 0, height = 0, width = 0;
  std::vector<float> pixels;  // (N,C,H,W)
  size_t captions = 0, text_tokens = 0, text_dim = 0;
  std::vector<float> text;        // (M,L,d_text)
  std::vector<float> empty_text;  // (L,d_text), what guidance calls unconditional
  std::vector<int32_t> caption;   // (N), which of the M captions an image has

  size_t image_size() const { return channels * height * width; }
};

// ---------------------------------------------------------------------------------------------
// 1. The text encoder
//
// A stand-in for a large frozen one: it knows nothing, but equal words get equal vectors, different
// words nearly orthogonal ones, and that is all a network needs to tell ten captions apart.

// 64-bit FNV-1a: the same on every machine and in every build.
struct Fnv1a {
  uint64_t hash = 0xcbf29ce484222325u;

  void mix(uint32_t x) { hash = (hash ^ x) * 0x100000001b3u; }
};

// The word decides its vector.
inline uint64_t hash_word(const std::string& word) {
  Fnv1a fnv;
  for (unsigned char c : word) fnv.mix(c);
  return fnv.hash;
}

// The words of a text between white space, in lower case.
inline std::vector<std::string> words_of(const std::string& text) {
  std::vector<std::string> words;
  bool inside = false;
  for (unsigned char c : text) {
    bool space = std::isspace(c);
    if (!space && !inside) words.emplace_back();
    if (!space) words.back() += static_cast<char>(std::tolower(c));
    inside = !space;
  }
  return words;
}

// A caption as (tokens, dim): a fixed N(0,1) vector a word, then padding; "" is all padding.
// Fails if the caption has more words than `tokens`.
inline std::vector<float> encode_text(const std::string& caption, size_t tokens, size_t dim) {
  std::vector<std::string> words = words_of(caption);
  if (words.size() > tokens)
    fail("the caption %s has %zu words, but there are %zu text tokens", printable(caption).c_str(),
         words.size(), tokens);
  // Padding is a word too, not zeros: the text goes through RMSNorm, whose derivative at zero is
  // 1/sqrt(eps), a thousandfold gain.
  words.resize(tokens, "<pad>");
  std::vector<float> text;
  text.reserve(tokens * dim);
  for (const std::string& word : words)
    for (size_t i = 0; i < dim; ++i)
      text.push_back(static_cast<float>(gaussian(hash_word(word), 0, i)));
  return text;
}

// What is encoded for a prompt: "sneaker" becomes "a photo of a sneaker". A prompt that begins with
// "a photo of", or is empty, stays as it is.
inline std::string caption_of(const std::string& prompt) {
  std::vector<std::string> words = words_of(prompt);
  if (words.empty() ||
      (words.size() > 2 && words[0] == "a" && words[1] == "photo" && words[2] == "of"))
    return prompt;
  bool vowel = std::string("aeiou").find(words[0][0]) != std::string::npos;
  return (vowel ? "a photo of an " : "a photo of a ") + prompt;
}

// Fills in all that concerns text, one caption a name; see encode_text() for errors.
inline void set_captions(Dataset& data, const std::vector<std::string>& names, size_t tokens,
                         size_t dim) {
  data.captions = names.size(), data.text_tokens = tokens, data.text_dim = dim;
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
  std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (!file) fail("cannot open %s: %s", path.c_str(), std::strerror(errno));
  auto read = [&](unsigned char* to, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
      // zlib counts in int
      int got = gzread(file.get(), to + done, unsigned(std::min<size_t>(bytes - done, 1 << 30)));
      int status;  // gzerror's text begins with the path
      if (got < 0) fail("cannot read %s: fetch it again", gzerror(file.get(), &status));
      if (got == 0) fail("%s is truncated: fetch it again", path.c_str());
      done += size_t(got);
    }
  };
  auto number = [&] {
    unsigned char b[4];
    read(b, 4);
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
  read(data.data(), data.size());
  // Only at its end does a gzip stream show whether its checksum holds.
  unsigned char extra;
  int got = gzread(file.get(), &extra, 1);
  if (got > 0) fail("%s has bytes after its %zu items", path.c_str(), count);
  if (got < 0 || gzclose(file.release()) != Z_OK) fail("%s is corrupt or truncated", path.c_str());
  return data;
}

// The 60,000 training or 10,000 test images of a folder with the four .gz files, (N,1,32,32): 28x28
// with a black border, so that patches of 2 and of 4 fit. Fails on a missing or damaged file.
inline Dataset load_fashion_mnist(const std::string& folder, bool train, size_t tokens = 8,
                                  size_t dim = 64) {
  constexpr size_t side = 28, border = 2, padded = side + 2 * border;
  std::string prefix = folder + (train ? "/train" : "/t10k");
  auto bytes = read_idx(prefix + "-images-idx3-ubyte.gz", {side, side});
  auto labels = read_idx(prefix + "-labels-idx1-ubyte.gz", {});
  Dataset data;
  data.images = bytes.size() / (side * side);
  data.channels = 1, data.height = data.width = padded;
  if (labels.size() != data.images)
    fail("%s has %zu images but %zu labels", folder.c_str(), data.images, labels.size());
  set_captions(data,
               {"t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
                "bag", "ankle boot"},
               tokens, dim);
  for (size_t n = 0; n < labels.size(); ++n)
    if (labels[n] >= data.captions)
      fail("%s: label %d of image %zu is not below 10", folder.c_str(), labels[n], n);
  data.caption.assign(labels.begin(), labels.end());
  data.pixels.assign(data.images * padded * padded, -1.0f);
  for (size_t n = 0; n < data.images; ++n)
    for (size_t h = 0; h < side; ++h)
      for (size_t w = 0; w < side; ++w)
        data.pixels[(n * padded + h + border) * padded + w + border] =
            bytes[(n * side + h) * side + w] / 127.5f - 1;
  return data;
}

// ---------------------------------------------------------------------------------------------
// 3. Other people's data

// A floating tensor of the given rank, every size at least 1, as floats; fails on anything else,
// and on NaN and infinity.
inline std::vector<float> read_finite(const SafetensorsReader& file, const std::string& path,
                                      const TensorInfo& tensor) {
  std::vector<float> values(tensor.count());
  file.read(tensor, values.data(), 0, values.size());
  for (size_t i = 0; i < values.size(); ++i)
    if (!std::isfinite(values[i])) {
      std::vector<size_t> at(tensor.shape.size());
      for (size_t d = at.size(), rest = i; d-- > 0; rest /= tensor.shape[d])
        at[d] = rest % tensor.shape[d];
      fail("%s: %s%s is %g, expected a finite float", path.c_str(), tensor.name.c_str(),
           shape_text(at).c_str(), double(values[i]));
    }
  return values;
}

// A safetensors file with latents (N,C,H,W) and text (M,L,d_text), floating, caption (N), integer
// in [0,M), and optionally empty (L,d_text), else zeros. Fails on a missing, unknown or misshapen
// tensor, a caption out of range, and NaN or infinity anywhere.
inline Dataset load_latents(const std::string& path) {
  SafetensorsReader file(path);
  file.require_only({"latents", "text", "caption", "empty"});
  auto shape_of = [&](const char* name, size_t rank, const char* letters) {
    const TensorInfo* tensor = file.find(name);
    if (!tensor) fail("%s: tensor %s %s is missing", path.c_str(), name, letters);
    if (tensor->shape.size() != rank || tensor->count() == 0)
      fail("%s: %s has shape %s, expected %s, none of them 0", path.c_str(), name,
           shape_text(tensor->shape).c_str(), letters);
    return tensor->shape;
  };
  auto latents = shape_of("latents", 4, "(N,C,H,W)"), text = shape_of("text", 3, "(M,L,d_text)");
  Dataset data;
  data.images = latents[0], data.channels = latents[1];
  data.height = latents[2], data.width = latents[3];
  data.captions = text[0], data.text_tokens = text[1], data.text_dim = text[2];
  if (data.captions > INT32_MAX) fail("%s has more than 2^31 - 1 captions", path.c_str());
  auto caption = file.read_integers(file.require("caption", {data.images}));
  for (size_t n = 0; n < caption.size(); ++n)
    if (caption[n] < 0 || caption[n] >= int64_t(data.captions))
      fail("%s: caption[%zu] is %lld, expected 0 to %zu", path.c_str(), n,
           static_cast<long long>(caption[n]), data.captions - 1);
  data.caption.assign(caption.begin(), caption.end());
  data.text = read_finite(file, path, *file.find("text"));
  data.empty_text.assign(data.text_tokens * data.text_dim, 0);
  if (file.find("empty"))
    data.empty_text =
        read_finite(file, path, file.require("empty", {data.text_tokens, data.text_dim}));
  data.pixels = read_finite(file, path, *file.find("latents"));
  return data;
}

// The entries of a folder that satisfy `wanted`, sorted by name: the same order on every machine.
template <class Wanted>
std::vector<std::filesystem::path> sorted_entries(const std::filesystem::path& folder,
                                                  Wanted wanted) {
  std::vector<std::filesystem::path> entries;
  std::error_code error;
  for (std::filesystem::directory_iterator at(folder, error), end; !error && at != end;
       at.increment(error))
    if (wanted(*at)) entries.push_back(at->path());
  if (error) fail("cannot read the folder %s: %s", folder.c_str(), error.message().c_str());
  std::sort(entries.begin(), entries.end());
  return entries;
}

// PNG images of one size in sub-folders named by their captions, as in sneaker/1.png; other files
// are passed over. Fails if there are none, or if they differ in size or channels.
inline Dataset load_folder(const std::string& path, size_t tokens = 8, size_t dim = 64) {
  Dataset data;
  std::vector<std::string> names;
  for (const auto& folder : sorted_entries(path, [](auto& e) { return e.is_directory(); })) {
    auto files = sorted_entries(folder, [](auto& e) { return e.path().extension() == ".png"; });
    for (const auto& file : files) {
      size_t C, H, W;
      std::vector<float> image = read_png(file, &C, &H, &W);
      if (data.images == 0) data.channels = C, data.height = H, data.width = W;
      if (C != data.channels || H != data.height || W != data.width)
        fail("%s is %zu x %zu x %zu (channels, height, width), those before it %zu x %zu x %zu",
             file.c_str(), C, H, W, data.channels, data.height, data.width);
      data.pixels.insert(data.pixels.end(), image.begin(), image.end());
      data.caption.push_back(static_cast<int32_t>(names.size()));
      ++data.images;
    }
    if (!files.empty()) names.push_back(folder.filename());
  }
  if (data.images == 0)
    fail("%s holds no PNG images in sub-folders named by their captions, as in %s/sneaker/1.png",
         path.c_str(), path.c_str());
  set_captions(data, names, tokens, dim);
  return data;
}

// ---------------------------------------------------------------------------------------------
// 4. One door

// Keeps the training images, or those held out: every 16th (every N-th of N < 16). A single image
// is both, for nothing else is left to validate on.
inline void keep_split(Dataset& data, bool train) {
  size_t stride = std::min<size_t>(16, data.images), size = data.image_size(), kept = 0;
  if (stride < 2) return;
  for (size_t n = 0; n < data.images; ++n) {
    bool held_out = n % stride == stride - 1;
    if (held_out == train) continue;
    std::copy_n(data.pixels.begin() + n * size, size, data.pixels.begin() + kept * size);
    data.caption[kept++] = data.caption[n];
  }
  data.images = kept;
  data.pixels.resize(kept * size);
  data.pixels.shrink_to_fit();
  data.caption.resize(kept);
}

// Loads "fashion-mnist" (or a folder with its files), a .safetensors file of latents, or a folder
// of PNGs; the training images or the held-out ones. Fails if there is no such thing.
inline Dataset load_dataset(const std::string& where, bool train) {
  auto holds_idx = [](const std::string& folder) {
    std::error_code ignored;
    return std::filesystem::exists(folder + "/train-images-idx3-ubyte.gz", ignored);
  };
  if (where == "fashion-mnist") {
    for (const char* folder : {"data/downloads", "/usr/share/datasets/fashion-mnist"})
      if (holds_idx(folder)) return load_fashion_mnist(folder, train);
    fail("Fashion-MNIST is not here: run `bash data/fetch.sh`, which fetches it");
  }
  if (holds_idx(where)) return load_fashion_mnist(where, train);
  bool latents = std::filesystem::path(where).extension() == ".safetensors";
  std::error_code ignored;
  if (!latents && !std::filesystem::is_directory(where, ignored))
    fail("no data at %s: expected fashion-mnist, a .safetensors file, or a folder of PNGs",
         where.c_str());
  Dataset data = latents ? load_latents(where) : load_folder(where);
  keep_split(data, train);
  return data;
}
