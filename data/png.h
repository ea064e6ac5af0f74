// png.h - pictures in and out.
//
// What it is: a grid of images as one PNG file, and one PNG file as an image. Images are (C,H,W) of
// floats with -1 for black and 1 for white, as the network sees them.
// What it is not: an image library. stb does the work; it is not hardened against hostile files,
// so read your own.
#pragma once

#include "safetensors.h"

#include <fstream>
#include <iterator>

// Static, so that every program has its own copy and there is no library to build. What stb leaves
// unused is not for us to mend.
#if defined(__CUDACC__)
#pragma nv_diagnostic push
#pragma nv_diag_suppress 177, 550
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#define STBI_MAX_DIMENSIONS 16384
#include <stb/stb_image.h>
#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#include <stb/stb_image_write.h>
#pragma GCC diagnostic pop
#if defined(__CUDACC__)
#pragma nv_diagnostic pop
#endif

// Writes images (rows * columns, C,H,W) in [-1,1], row by row, with a white gap of two pixels
// between them and each pixel drawn `scale` x `scale`. C = 1 and 2 give the first channel in grey,
// more give the first three as red, green and blue. Values outside are clamped, NaN is black.
// Fails if the picture is empty or over 16384 pixels a side, or cannot be written.
inline void write_png_grid(const std::string& path, const float* images, size_t rows,
                           size_t columns, size_t C, size_t H, size_t W, size_t scale = 2) {
  constexpr size_t gap = 2, limit = 16384;
  // Each factor is bounded before they are multiplied.
  for (size_t n : {rows, columns, C, H, W, scale})
    if (n == 0 || n > limit) fail("cannot write %s: %zu is no size of a picture", path.c_str(), n);
  size_t step_y = H * scale + gap, step_x = W * scale + gap;
  size_t height = rows * step_y - gap, width = columns * step_x - gap, colors = C < 3 ? 1 : 3;
  if (height > limit || width > limit)
    fail("cannot write %s: %zu x %zu pixels are more than %zu a side", path.c_str(), height, width,
         limit);
  std::vector<unsigned char> picture(height * width * colors, 255);
  for (size_t y = 0; y < height; ++y)
    for (size_t x = 0; x < width; ++x) {
      size_t h = y % step_y / scale, w = x % step_x / scale;
      if (h >= H || w >= W) continue;  // in a gap
      const float* image = images + (y / step_y * columns + x / step_x) * C * H * W;
      for (size_t c = 0; c < colors; ++c) {
        float v = image[(c * H + h) * W + w];
        v = v > -1 ? std::min(v, 1.0f) : -1;
        picture[(y * width + x) * colors + c] = static_cast<unsigned char>((v + 1) * 127.5f + 0.5f);
      }
    }
  // Collected first: an exception must not pass through stb, which would leak its buffers.
  std::string bytes;
  auto append = [](void* to, void* data, int size) {
    static_cast<std::string*>(to)->append(static_cast<char*>(data), size_t(size));
  };
  if (!stbi_write_png_to_func(append, &bytes, int(width), int(height), int(colors), picture.data(),
                              int(width * colors)))
    fail("cannot write %s: out of memory for %zu x %zu pixels", path.c_str(), height, width);
  SafeFile file(path, bytes.size());
  file.write(bytes);
  file.commit();
}

// Reads a PNG file as (C,H,W) in [-1,1], C = 1 if it is grey and 3 if it has colours; transparency
// is dropped. Fails if the file cannot be opened or is not a whole PNG.
inline std::vector<float> read_png(const std::string& path, size_t* C, size_t* H, size_t* W) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot open %s: %s", path.c_str(), std::strerror(errno));
  std::vector<unsigned char> bytes{std::istreambuf_iterator<char>(file), {}};
  int width = 0, height = 0, channels = 0;
  bool known = bytes.size() <= INT32_MAX &&
               stbi_info_from_memory(bytes.data(), int(bytes.size()), &width, &height, &channels);
  int colors = channels < 3 ? 1 : 3;
  std::unique_ptr<unsigned char, void (*)(void*)> pixels(
      known ? stbi_load_from_memory(bytes.data(), int(bytes.size()), &width, &height, &channels,
                                    colors)
            : nullptr,
      stbi_image_free);
  if (!pixels) fail("cannot read %s: it is not a whole PNG file", path.c_str());
  *C = size_t(colors), *H = size_t(height), *W = size_t(width);
  std::vector<float> image(*C * *H * *W);
  for (size_t c = 0; c < *C; ++c)
    for (size_t i = 0; i < *H * *W; ++i)
      image[c * *H * *W + i] = pixels.get()[i * *C + c] / 127.5f - 1;
  return image;
}
