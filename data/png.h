// png.h - pictures in and out.
//
// What it is: a grid of images as one PNG file, captions beside its rows, and one PNG file as an
// image. Images are (C,H,W) of floats with -1 for black and 1 for white, as the network sees them.
// What it is not: an image library. stb does the work, but for the checksums, which it passes over;
// it is not hardened against hostile files, so read your own.
#pragma once

#include "safetensors.h"

#include <fstream>

#include <zlib.h>

// Static, so that every program has its own copy and there is no library to build. What stb leaves
// unused is not for us to mend.
#if defined(__CUDACC__)
#pragma nv_diagnostic push
#pragma nv_diag_suppress 177, 550
#endif
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#define STBI_MAX_DIMENSIONS 16384
#include <stb/stb_easy_font.h>
#include <stb/stb_image.h>
#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#include <stb/stb_image_write.h>
#if defined(__CUDACC__)
#pragma nv_diagnostic pop
#endif

// A caption as a grid shows it: one line of ASCII, all that the font has, and not too long.
inline std::string grid_label(const std::string& caption) {
  constexpr size_t longest = 32;
  std::string label;
  for (unsigned char c : caption)
    if ((c & 0xc0) != 0x80)  // one '?' for a letter of several bytes
      label += c > 32 && c < 127 ? static_cast<char>(c) : c <= 32 ? ' ' : '?';
  if (label.empty()) return "(empty)";
  return label.size() <= longest ? label : label.substr(0, longest - 3) + "...";
}

// A grid of images, each drawn at `scale`, and the captions of its rows, or none.
struct Grid {
  size_t rows, columns, C, H, W, scale = 2;
  Words captions = {};
};

// Where things lie in it, in pixels.
struct GridLayout {
  static constexpr size_t gap = 2, margin = 6, line = 12, limit = 16384;
  Words labels;  // to the left of each row; or none at all
  size_t letter, left, step_y, step_x, height, width;
};

// Images are drawn `scale` x `scale` with a gap of two pixels between them. Fails, naming `path`,
// if the picture is empty, over 16384 pixels a side, or of more than three channels.
inline GridLayout grid_layout(const std::string& path, const Grid& grid) {
  using G = GridLayout;
  const auto& [rows, columns, C, H, W, scale, captions] = grid;
  // Each factor is bounded before they are multiplied.
  for (size_t n : {rows, columns, C, H, W, scale})
    if (n == 0 || n > G::limit)
      fail("cannot write %s: %zu is no size of a picture", path.c_str(), n);
  if (C > 3)
    fail("cannot write %s: a picture has three channels at most, not %zu: name a .safetensors",
         path.c_str(), C);
  G g{{}, std::clamp<size_t>(H * scale / 32, 1, 3), 0, H * scale, W * scale + G::gap, 0, 0};
  for (const std::string& caption : captions) {
    g.labels.push_back(grid_label(caption));
    size_t wide = size_t(stb_easy_font_width(g.labels.back().data())) * g.letter;
    g.left = std::max(g.left, wide + 2 * G::margin);
    g.step_y = std::max(g.step_y, G::line * g.letter);
  }
  g.step_y += G::gap;
  g.height = rows * g.step_y - G::gap, g.width = g.left + columns * g.step_x - G::gap;
  if (g.height > G::limit || g.width > G::limit)
    fail("cannot write %s: %zu x %zu pixels are more than %zu a side", path.c_str(), g.height,
         g.width, G::limit);
  return g;
}

// What a grid's images are drawn at.
inline size_t grid_scale(size_t H, size_t W) { return std::max(H, W) > 256 ? 1 : 2; }

// Writes images (rows * columns, C,H,W) in [-1,1], row by row, on white, each row beside its
// caption if there are any. C = 1 and 2 give the first channel in grey, 3 are red, green and blue.
// Values outside are clamped, NaN is black. Fails as grid_layout() and SafeFile do.
inline void write_png_grid(const std::string& path, const float* images, const Grid& grid) {
  const auto& [rows, columns, C, H, W, scale, captions] = grid;
  GridLayout g = grid_layout(path, grid);
  size_t colors = C < 3 ? 1 : 3, row_bytes = g.width * colors;
  std::vector<unsigned char> picture(g.height * row_bytes, 255);
  for (size_t y = 0; y < g.height; ++y)
    for (size_t x = g.left; x < g.width; ++x) {
      size_t h = y % g.step_y / scale, w = (x - g.left) % g.step_x / scale;
      if (h >= H || w >= W) continue;  // in a gap
      const float* image = images + (y / g.step_y * columns + (x - g.left) / g.step_x) * C * H * W;
      for (size_t c = 0; c < colors; ++c) {
        float v = image[(c * H + h) * W + w];
        v = v > -1 ? std::min(v, 1.0f) : -1;
        picture[y * row_bytes + x * colors + c] = uint8_t((v + 1) * 127.5f + 0.5f);
      }
    }
  for (size_t row = 0; row < g.labels.size(); ++row) {
    // A letter is a few black bars, each given by four corners of (x, y, z, colour).
    std::string& label = g.labels[row];
    std::vector<float> corners(label.size() * 512);
    int bars = stb_easy_font_print(0, 0, label.data(), nullptr, corners.data(),
                                   int(corners.size() * sizeof(float)));
    size_t top = row * g.step_y + (g.step_y - 10 * g.letter) / 2;
    size_t begin = g.left - g.margin - size_t(stb_easy_font_width(label.data())) * g.letter;
    for (const float* bar = corners.data(); bar < corners.data() + 16 * bars; bar += 16)
      for (size_t y = size_t(bar[1]) * g.letter; y < size_t(bar[9]) * g.letter; ++y) {
        auto line = picture.begin() + ptrdiff_t((top + y) * row_bytes + begin * colors);
        std::fill(line + ptrdiff_t(size_t(bar[0]) * g.letter * colors),
                  line + ptrdiff_t(size_t(bar[8]) * g.letter * colors), 0);
      }
  }
  // Collected first: an exception must not pass through stb, which would leak its buffers.
  std::string bytes;
  auto append = [](void* to, void* data, int size) {
    static_cast<std::string*>(to)->append(static_cast<char*>(data), size_t(size));
  };
  if (!stbi_write_png_to_func(append, &bytes, int(g.width), int(g.height), int(colors),
                              picture.data(), int(row_bytes)))
    fail("cannot write %s: out of memory for %zu x %zu pixels", path.c_str(), g.height, g.width);
  SafeFile file(path, bytes.size());
  file.write(bytes);
  file.commit();
}

// Writes images as write_png_grid() does or, if the name ends in .safetensors, as they are, as the
// tensor `samples`, rows one behind the other; `captions` in the metadata says of what they are.
inline void write_samples(const std::string& path, const std::vector<float>& images,
                          const Grid& grid) {
  if (!has_extension(path, ".safetensors")) return write_png_grid(path, images.data(), grid);
  constexpr auto replace = nlohmann::json::error_handler_t::replace;  // what is not UTF-8
  SafetensorsWriter file(
      path, {{"captions", nlohmann::json(grid.captions).dump(-1, ' ', false, replace)}});
  file.declare("samples", "F32", {grid.rows * grid.columns, grid.C, grid.H, grid.W});
  file.write(images.data(), images.size());
  file.finish();
}

// Fails unless the bytes are a PNG file whose checksums hold: of its chunks, each of which is a
// length, a type, data and their CRC-32 (numbers big-endian), and of the zlib stream in its IDAT
// chunks. Returns where its palette is, a chunk; 0: nowhere.
inline size_t check_png(const std::string& path, const std::vector<unsigned char>& bytes,
                        size_t most) {
  auto cut = [&] { fail("cannot read %s: it is not a whole PNG file", path.c_str()); };
  auto number = [&](size_t at) {
    return uint32_t(bytes[at]) << 24 | bytes[at + 1] << 16 | bytes[at + 2] << 8 | bytes[at + 3];
  };
  std::string type;
  size_t palette = 0;
  std::vector<unsigned char> packed;
  for (size_t at = 8, length; type != "IEND"; at += 12 + length) {
    if (at + 12 > bytes.size() || (length = number(at)) > bytes.size() - at - 12) cut();
    type.assign(&bytes[at + 4], &bytes[at + 8]);
    if (crc32(0, &bytes[at + 4], uInt(4 + length)) != number(at + 8 + length))
      fail("cannot read %s: it is damaged: a checksum does not hold", path.c_str());
    if (type == "PLTE") palette = at;
    if (type == "IDAT") packed.insert(packed.end(), &bytes[at + 8], &bytes[at + 8] + length);
  }
  if (most > UINT32_MAX) fail("cannot read %s: it is too large a picture", path.c_str());
  std::unique_ptr<unsigned char[]> unused(new unsigned char[most]);
  z_stream stream{};
  stream.next_in = packed.data(), stream.avail_in = uInt(packed.size());
  stream.next_out = unused.get(), stream.avail_out = uInt(most);
  if (inflateInit(&stream) != Z_OK) fail("cannot read %s: out of memory", path.c_str());
  int status = inflate(&stream, Z_FINISH);
  inflateEnd(&stream);
  if (status == Z_DATA_ERROR) fail("cannot read %s: it is damaged: %s", path.c_str(), stream.msg);
  if (status != Z_STREAM_END) cut();
  return palette;
}

// A pixel's number may lie beyond the palette, and stb does not look. Fills the palette up with a
// grey that it lacks, which then no pixel may have, and returns that; 256 if nothing is to be done.
inline int fill_palette(std::vector<unsigned char>& bytes, size_t palette) {
  size_t n = size_t(bytes[palette + 2]) << 8 | bytes[palette + 3], begin = palette + 8;
  if (n % 3 != 0 || n >= 768) return 256;
  std::set<int> greys;
  for (size_t i = begin; i < begin + n; i += 3)
    if (bytes[i] == bytes[i + 1] && bytes[i] == bytes[i + 2]) greys.insert(bytes[i]);
  int grey = 0;
  while (greys.count(grey)) ++grey;
  bytes.insert(bytes.begin() + ptrdiff_t(begin + n), 768 - n, uint8_t(grey));
  bytes[palette + 2] = 3, bytes[palette + 3] = 0;
  return grey;
}

// Reads a PNG file as (C,H,W) in [-1,1], C = 1 if it is grey and 3 if it has colours. Transparency
// is blended with black, the ground of this project's pictures: what colour a pixel hides that
// nobody sees must not be learned. Fails if the file cannot be opened or is not a whole PNG.
inline std::vector<float> read_png(const std::string& path, size_t* C, size_t* H, size_t* W) {
  require_regular(path);
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot open %s: %s", path.c_str(), std::strerror(errno));
  std::vector<unsigned char> bytes{std::istreambuf_iterator<char>(file), {}};
  int width = 0, height = 0, channels = 0;
  bool known = bytes.size() <= INT32_MAX &&
               stbi_info_from_memory(bytes.data(), int(bytes.size()), &width, &height, &channels);
  if (!known) fail("cannot read %s: it is not a whole PNG file", path.c_str());
  *C = channels < 3 ? 1 : 3, *H = size_t(height), *W = size_t(width);
  // At most 8 bytes a pixel, and the beginnings and ends of rows, of which interlacing makes more.
  size_t palette = check_png(path, bytes, 8 * *H * *W + 8 * *H + 64);
  int absent = palette && bytes[25] == 3 ? fill_palette(bytes, palette) : 256;  // its kind, in IHDR
  // 16 bits hold whatever a PNG does. An 8-bit number is multiplied by 257.
  std::unique_ptr<stbi_us, void (*)(void*)> pixels(
      stbi_load_16_from_memory(bytes.data(), int(bytes.size()), &width, &height, &channels,
                               int(*C) + 1),
      stbi_image_free);
  if (!pixels) fail("cannot read %s: %s", path.c_str(), stbi_failure_reason());
  std::vector<float> image(*C * *H * *W);
  for (size_t i = 0; i < *H * *W && absent < 256; ++i)
    if (std::all_of(&pixels.get()[4 * i], &pixels.get()[4 * i + 3],
                    [&](int v) { return v == 257 * absent; }))
      fail("cannot read %s: it is damaged: a pixel's number is not in its palette", path.c_str());
  for (size_t c = 0; c < *C; ++c)
    for (size_t i = 0; i < *H * *W; ++i) {
      const stbi_us* pixel = pixels.get() + i * (*C + 1);
      image[c * *H * *W + i] = float(double(pixel[c]) * pixel[*C] / 65535) / 32767.5f - 1;
    }
  return image;
}
