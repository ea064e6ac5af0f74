// checkpoint.h - the network's weights on disk, under the names of the author's PyTorch model.
//
// What it is: the parameter table of dit.cu written to and read from safetensors, and the
// configuration that a weights file carries or implies.
// What it is not: the format itself (safetensors.h), or a run's state (state.h), which uses it.
//
// How to read it: read_config() is describe()'s inverse, load_tensors() that of save_tensors().
#pragma once

#include "../dit.cu"
#include "log.h"

#include <charconv>

using Metadata = std::map<std::string, std::string>;

inline std::string swapped(std::string name, char from, char to) {
  std::replace(name.begin(), name.end(), from, to);
  return name;
}

inline std::string exact(double x) { return text_of("%.17g", x); }
inline std::string exact(size_t x) { return std::to_string(x); }

// A size of a network: its name in a file (and, with dashes, of its flag) and what it is; whether
// the data has it, and whether the tensors' shapes show it.
struct Size {
  const char *name, *about;
  size_t& value;
  bool of_data, shown;
};
inline std::vector<Size> sizes_of(Config& c) {
  return {{"depth", "blocks", c.depth, false, true},
          {"width", "channels D of a token", c.width, false, true},
          {"heads", "attention heads", c.heads, false, false},
          {"ffn", "width of the FFN", c.ffn, false, true},
          {"patch", "pixels along a patch", c.patch, false, true},
          {"channels", "channels of the image", c.channels, true, true},
          {"height", "pixels", c.height, true, false},
          {"image_width", "pixels", c.image_width, true, false},
          {"text_tokens", "tokens of a caption", c.text_tokens, true, false},
          {"text_dim", "numbers of a text token", c.text_dim, true, true}};
}

// What a file says about the network in it.
inline Metadata describe(Config c, double time_shift) {
  Metadata m = {{"residual", c.residual},
                {"means", c.means},
                {"norm_eps", exact(c.norm_eps)},
                {"time_shift", exact(time_shift)}};
  for (const Size& size : sizes_of(c)) m[size.name] = exact(size.value);
  return m;
}

// The number that a text is; nothing where it is anything else. Decimal digits alone, that fit:
// no sign before a whole number, no blanks, no separators, a point in every locale.
template <class Number>
std::optional<Number> number_in(const std::string& text) {
  Number value = 0;
  const char* end = text.data() + text.size();
  auto [at, error] = std::from_chars(text.data(), end, value);
  bool good = error == std::errc() && at == end && std::isfinite(double(value));
  return good ? std::optional(value) : std::nullopt;
}

inline size_t positive_integer(const std::string& text, const std::string& what) {
  size_t value = number_in<size_t>(text).value_or(0);
  if (value == 0) fail("%s is '%s', expected a positive integer", what.c_str(), text.c_str());
  return value;
}

inline double finite_number(const std::string& text, const std::string& what) {
  std::optional<double> value = number_in<double>(text);
  if (!value) fail("%s is '%s', expected a number", what.c_str(), text.c_str());
  return *value;
}

// Tells, on stderr, what neither a file nor a flag says, and what it is taken to be.
inline void note_assumed(const std::string& path, const Words& assumed) {
  if (!assumed.empty())
    std::fprintf(stderr, "note: the metadata of %s does not say all: taken are %s\n",
                 visible(path).c_str(), join_list(assumed, ", ").c_str());
}

// The configuration of a weights file: sizes from the shapes, the rest from its metadata where it
// has any. Image and text tokens stay as in `c` if the file is silent. So do means and norm_eps,
// and the residual is guessed from the tensors' names, where they leave it open as in `c`; the
// answer tells. `heads`, which change what is computed and no shape, are never guessed: fails if
// the file is silent too, or says otherwise. `norm_eps`, if any, is taken whatever the file says.
inline Words read_config(const SafetensorsReader& file, const std::string& path, Config& c,
                         std::optional<size_t> heads = {}, std::optional<double> norm_eps = {}) {
  auto shape = [&](const std::string& name, size_t rank) {
    const TensorInfo* t = file.find(name);
    if (!t || t->shape.size() != rank)
      fail("%s: tensor %s with %zu dimensions is missing: not the weights of this model",
           path.c_str(), name.c_str(), rank);
    return t->shape;
  };
  auto patch = shape("patch_embed.patch_proj.weight", 4);
  c.width = patch[0], c.channels = patch[1], c.patch = patch[2];
  c.ffn = shape("blocks.0.ffn.w2.weight", 2)[1];
  c.text_dim = file.find("context_proj.weight") ? shape("context_proj.weight", 2)[1] : c.width;
  c.patch_bias = file.find("patch_embed.patch_proj.bias") != nullptr;
  c.depth = 0;
  while (file.find("blocks." + std::to_string(c.depth) + ".ffn.w2.weight")) ++c.depth;
  // The mode of which all gates are there; of several, one with the most.
  const std::string told = c.residual;
  size_t most = 0;
  for (const Residual& mode : residuals) {
    size_t gates = 0, found = 0;
    for (int merge : {0, 1})
      for (const Gate& gate : about(merge ? mode.ffn : mode.attention).gates)
        ++gates, found += file.find("blocks.0." + file_name(gate, merge)) != nullptr;
    bool as_told = gates == most && mode.name == told;
    if (found == gates && (gates > most || as_told || &mode == &residuals[0]))
      c.residual = mode.name, most = gates;
  }
  const Metadata& m = file.metadata();
  if (!heads && !m.count("heads"))
    fail(
        "%s does not say how many attention heads it has: give --heads (the author's released "
        "model has 8)",
        path.c_str());
  c.heads = heads.value_or(1);
  for (const Size& size : sizes_of(c)) {
    size_t held = size.value;
    if (m.count(size.name))
      size.value = positive_integer(m.at(size.name), path + ": metadata " + size.name);
    if (size.shown && size.value != held)
      fail("%s: metadata says %s %zu, but its tensors have %zu", path.c_str(), size.name,
           size.value, held);
  }
  if (heads && *heads != c.heads)
    fail("--heads %zu: %s says that it has %zu", *heads, path.c_str(), c.heads);
  if (m.count("residual")) c.residual = m.at("residual");
  if (m.count("means")) c.means = m.at("means");
  if (m.count("norm_eps"))
    c.norm_eps = finite_number(m.at("norm_eps"), path + ": metadata norm_eps");
  if (norm_eps) c.norm_eps = *norm_eps;
  try {
    c.check();
  } catch (const Error& error) {
    fail("%s: %s", path.c_str(), error.what());
  }
  Words assumed;
  if (!m.count("residual")) assumed.push_back("residual " + c.residual);
  if (!m.count("means")) assumed.push_back("means " + c.means);
  if (!norm_eps && !m.count("norm_eps")) assumed.push_back(text_of("norm_eps %g", c.norm_eps));
  return assumed;
}

// The time shift that is asked for, else what the network of the file was trained with.
inline double read_time_shift(const SafetensorsReader& file, const std::string& path,
                              std::optional<double> asked, Words& assumed) {
  if (asked) return *asked;
  auto at = file.metadata().find("time_shift");
  if (at != file.metadata().end()) {
    double said = finite_number(at->second, path + ": metadata time_shift");
    if (!(said > 0)) fail("%s: metadata time_shift is %g, not positive", path.c_str(), said);
    return said;
  }
  assumed.push_back("time shift 1 (the author's released model has 4: --time-shift)");
  return 1;
}

// A slab of numbers, one for each parameter (null: none), and what goes before their names there.
template <class Number>
struct Stored {
  std::string prefix;
  Number* slab;

  // Call f(name, parameter, where its numbers are) for each tensor.
  template <class F>
  void each(const Table& table, const F& f) const {
    if (!slab) return;
    for (const Parameter& p : table.parameters) f(prefix + p.name, p, slab + p.offset);
  }
};
template <class Number>
Stored(const char*, Number*) -> Stored<Number>;

// Write the table's tensors from each slab. Host memory: one tensor.
template <class... Number>
void save_tensors(const std::string& path, const Metadata& metadata, const Device& device,
                  const Table& table, const Stored<Number>&... slabs) {
  SafetensorsWriter file(path, metadata);
  auto declare = [&](const std::string& name, const Parameter& p, auto* from) {
    file.declare(name, dtype_name<std::remove_pointer_t<decltype(from)>>(), p.shape);
  };
  size_t written = ((slabs.slab != nullptr) + ... + 0);
  Progress progress("writing " + visible(path), written * table.parameters.size());
  auto write = [&](const std::string& name, const Parameter& p, auto* from) {
    auto host = downloaded(device, from, p.count());
    for (auto x : host)
      if (!std::isfinite(double(x)))
        fail("%s was not written: %s holds NaN or infinity, training has diverged", path.c_str(),
             name.c_str());
    file.write(host.data(), host.size());
    progress.advance(1);
  };
  (slabs.each(table, declare), ...);
  (slabs.each(table, write), ...);
  file.finish();
}

// The gains of norms that this model does not have are welcome if they are all ones.
inline bool is_norm_gain(const std::string& name) {
  return name == "norm_img_input.weight" || name == "norm_text_input.weight" ||
         ends_with(name, "fused_mvsplit_norm1.weight") ||
         ends_with(name, "fused_mvsplit_norm2.weight") ||
         name.find(".qk_norm.") != std::string::npos;
}

// Read the table's tensors into each slab. Anything missing, unknown or of another shape fails.
template <class... Number>
void load_tensors(const SafetensorsReader& file, const std::string& path, const Device& device,
                  const Table& table, const Stored<Number>&... slabs) {
  Progress progress("reading " + visible(path), file.tensors().size());
  auto read = [&](const TensorInfo& tensor, auto number) {
    progress.advance(1);
    auto host = file.read<decltype(number)>(tensor);
    for (auto x : host)
      if (!std::isfinite(double(x)))
        fail("%s: tensor %s holds NaN or infinity", path.c_str(), tensor.name.c_str());
    return host;
  };
  std::set<std::string> known;
  for (const TensorInfo& tensor : file.tensors())
    if (is_norm_gain(tensor.name)) {
      for (double x : read(tensor, double()))
        if (x != 1)
          fail("%s: %s is not all ones, but the norms of this model have no gain", path.c_str(),
               tensor.name.c_str());
      known.insert(tensor.name);
    }
  auto name = [&](const std::string& tensor, const Parameter&, void*) { known.insert(tensor); };
  auto require = [&](const std::string& tensor, const Parameter& p, const void*) {
    file.require(tensor, p.shape);
  };
  auto load = [&](const std::string& tensor, const Parameter&, auto* to) {
    auto host = read(*file.find(tensor), std::remove_pointer_t<decltype(to)>());
    device.upload(to, host.data(), host.size() * sizeof(host[0]));
  };
  (slabs.each(table, name), ...);
  file.require_only(known);
  (slabs.each(table, require), ...);
  (slabs.each(table, load), ...);
}
