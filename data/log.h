// log.h - what is written about a run: its console and its folder, csv files that survive a resume,
// the reports of a spike and of a probe.
#pragma once

#include "../dit.cu"
#include "safetensors.h"

#include <chrono>
#include <csignal>
#include <ctime>
#include <fstream>
#include <numeric>

#include <fnmatch.h>

// The end of a console ends no work for a file: not that of the reader behind a pipe (SIGPIPE), nor
// that of a terminal (SIGHUP). What is printed after it is lost.
inline void outlive_console() {
  for (int signal : {SIGPIPE, SIGHUP}) std::signal(signal, SIG_IGN);
}

// Opens an input or output that was closed: the next file would get its number, and its text.
inline void open_console() {
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is a write that fails
  for (int descriptor : {0, 1, 2})
    if (fcntl(descriptor, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) return;
}

// How far work has come that takes long, on the console: on a terminal in a line that is written
// over and taken away at the end; elsewhere, where lines stay, one every ten seconds.
class Progress {
 public:
  // `of` is what advance() will add up to.
  Progress(std::string what, size_t of) : what_(std::move(what)), of_(of) {}
  ~Progress() {
    if (shown_ && terminal_) std::printf("\r\033[K");
    std::fflush(stdout);
  }
  void advance(size_t by) {
    done_ += by;
    auto now = std::chrono::steady_clock::now();
    if (now < next_) return;
    next_ = now + std::chrono::milliseconds(terminal_ ? 200 : 10000);
    std::printf(terminal_ ? "\r\033[K%s: %zu of %zu" : "%s: %zu of %zu\n", what_.c_str(), done_,
                of_);
    std::fflush(stdout);
    shown_ = true;
  }

 private:
  const std::string what_;
  const size_t of_;
  const bool terminal_ = isatty(STDOUT_FILENO);
  size_t done_ = 0;
  bool shown_ = false;
  std::chrono::steady_clock::time_point next_ =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(terminal_ ? 500 : 2000);
};

// A folder that this process alone writes to, for as long as it is open. Fails if there is no
// folder, or if another process owns it.
inline File own_folder(const std::string& path) {
  File folder(std::fopen(path.c_str(), "re"), std::fclose);
  if (!folder) fail("cannot use the folder %s: %s", path.c_str(), std::strerror(errno));
  if (!lock_file(fileno(folder.get())))
    fail("another process trains in %s: wait for it, or choose another --out", path.c_str());
  return folder;
}

// The files in a folder that a run which begins there would write over, or add to as its own.
inline Words logs_in(const std::string& folder) {
  Words logs;
  if (!fs::is_directory(folder)) return logs;
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::string name = entry.path().filename();
    for (const char* pattern :
         {"log.csv", "validation.csv", "diagnostics.csv", "config.ini", "page.html", "spike_*.txt",
          "samples_*.png", "samples_*.safetensors"})
      if (fnmatch(pattern, name.c_str(), 0) == 0) logs.push_back(entry.path());
  }
  std::sort(logs.begin(), logs.end());
  return logs;
}

// ".1", or the first number that behind each of these names is free.
inline std::string free_end(const Words& names) {
  size_t number = 1;
  auto taken = [&](const std::string& x) { return fs::exists(x + "." + std::to_string(number)); };
  while (std::any_of(names.begin(), names.end(), taken)) ++number;
  return "." + std::to_string(number);
}

// Rename them all to NAME.1, or to the first number that is free for each of them.
inline void set_aside(const Words& logs) {
  const std::string end = free_end(logs);
  for (const std::string& log : logs) {
    fs::rename(log, log + end);
    std::printf("%s, of a run without a state, is %s now\n", visible(log).c_str(),
                visible(log + end).c_str());
  }
}

// A copy of n numbers of a device.
template <class Number>
std::vector<Number> downloaded(const Device& device, const Number* from, size_t n) {
  std::vector<Number> host(n);
  device.download(host.data(), from, n * sizeof(Number));
  return host;
}

// The bytes of a file; none where there is none, unless it must be there.
inline std::string read_text(const std::string& path, bool must_be_there = false) {
  require_regular(path);
  if (access(path.c_str(), R_OK) != 0 && (must_be_there || errno != ENOENT))
    fail("cannot read %s: %s", path.c_str(), std::strerror(errno));
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A csv of a run that goes on: rows of steps that will be done again are dropped. Whatever else is
// not a row of it, in its place, is left out, and the file as it was is kept. A row begins with its
// step; of a step with several rows, `keys` = 2, each has a number of its own behind that, in
// rising order. The header is the names of the columns, after lines of comment, if any. Fails if
// the file has rows under another header; `remedy` is what to do then.
class CsvLog {
 public:
  CsvLog(const std::string& path, const std::string& header, uint64_t steps_done, int keys = 1,
         const char* remedy = "move it away")
      : path_(path) {
    std::string text = steps_done ? read_text(path) : "";
    if (!text.empty() && text.rfind(header + "\n", 0) != 0)
      fail("%s describes other rows than this run's: %s", path.c_str(), remedy);
    std::istringstream old(text);
    std::string line, kept = header + "\n", names = header.substr(header.rfind('\n') + 1);
    auto fields = [](const std::string& s) { return std::count(s.begin(), s.end(), ','); };
    std::pair<unsigned long long, unsigned long long> last{0, ~0ull}, now;  // step, key
    size_t header_lines = size_t(std::count(kept.begin(), kept.end(), '\n')), lost = 0;
    for (size_t i = 0; std::getline(old, line); ++i) {
      int numbers = std::sscanf(line.c_str(), "%llu,%llu", &now.first, &now.second);
      if (keys == 1) now.second = 0;
      // A line without its end was cut off, and so may be its last number.
      bool row = numbers >= keys && fields(line) == fields(names) && !old.eof() && last < now;
      if (i < header_lines || (numbers >= 1 && now.first > steps_done)) continue;
      if (row) kept += line + "\n", last = now;
      lost += !row;
    }
    last_ = last.first;
    if (lost > 0) {
      const std::string aside = path + free_end({path});
      fs::copy_file(path, aside);
      std::fprintf(stderr, "note: %s has lines that are not its rows (%zu): they are in %s\n",
                   visible(path).c_str(), lost, visible(aside).c_str());
    }
    SafeFile file(path);
    file.write(kept);
    file.commit();
    file_.reset(std::fopen(path.c_str(), "a"));
    require(file_ != nullptr);
  }
  // The row or rows of `step`, unless they are there. What the disk does not take waits for the
  // next time: a warning for the first of it.
  void row(uint64_t step, const std::string& text) {
    if (step <= last_) return;
    last_ = step;
    bool first = waiting_.empty();
    waiting_ += text + "\n";
    if (!flush() && first)
      std::fprintf(stderr, "warning: cannot write %s: %s\n", visible(path_).c_str(),
                   std::strerror(errno));
  }
  uint64_t last() const { return last_; }  // step
  // Flush to the disk, before a state says these steps are done: no run does them again.
  void sync() { require(flush() && fsync(fileno(file_.get())) == 0); }

 private:
  void require(bool done) const {
    if (!done) fail("cannot write %s: %s", path_.c_str(), std::strerror(errno));
  }
  // Whole rows or none: a part would begin the next row.
  bool flush() {
    int file = fileno(file_.get());
    off_t end = lseek(file, 0, SEEK_END);
    ssize_t n = ::write(file, waiting_.data(), waiting_.size());
    if (n == ssize_t(waiting_.size())) return waiting_.clear(), true;
    int reason = n < 0 ? errno : ENOSPC;
    if (ftruncate(file, end) == 0) errno = reason;
    return false;
  }

  std::string path_, waiting_;
  uint64_t last_ = 0;
  File file_{nullptr, std::fclose};
};

// Up to 2047 bytes.
__attribute__((format(printf, 1, 2))) inline std::string text_of(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

// "1h02m", "3m20s", "12s".
inline std::string duration(double seconds) {
  long s = long(seconds + 0.5);
  if (s < 60) return text_of("%lds", s);
  return s < 3600 ? text_of("%ldm%02lds", s / 60, s % 60)
                  : text_of("%ldh%02ldm", s / 3600, s / 60 % 60);
}

// Operations a second that a card can do at most in products of Real without sparsity, as its maker
// says; 0 for a card or a type that is not in the table. The names are those that its driver gives.
template <class Real>
double peak_flops(const std::string& name) {
  const std::tuple<const char*, double, double> cards[] = {
      {"H100 PCIe", 756, 51}, {"H100 NVL", 835, 60}, {"H100 80GB HBM3", 989, 67},
      {"H200 NVL", 836, 60},  {"H200", 989, 67},     {"A100", 312, 19.5}};
  for (auto [card, bf16_tera, fp32_tera] : cards)
    if (name.find(card) != std::string::npos && sizeof(Real) <= 4)
      return 1e12 * (sizeof(Real) == 2 ? bf16_tera : fp32_tera);
  return 0;
}

// diagnostics.csv: a comment that says what each column is, the names, a step's rows, one a layer.
inline std::string diagnostics_header(const std::vector<Reading>& columns, const Config& m,
                                      size_t samples) {
  std::string about = text_of(
      "# Means over those of the first %zu samples of the step's last pass in which a number is "
      "defined; J, P over all %zu tokens of a sample.\n# Gradients are of the step's loss, each "
      "sample's part of it. nan: defined in none (a state or gradient is zero).\n# step: as in "
      "log.csv\n# layer: block, from 0 to %zu\n",
      samples, m.tokens(), m.depth - 1);
  std::string names = "step,layer";
  for (const Reading& r : columns) {
    about += "# " + r.name + ": " + r.about + "\n";
    names += "," + r.name;
  }
  return about + names;
}
inline std::string diagnostics_rows(uint64_t step, const std::vector<size_t>& layers,
                                    const std::vector<std::vector<Reading>>& readings) {
  std::string rows;
  for (size_t i = 0; i < layers.size(); ++i) {
    rows += text_of("%s%zu,%zu", i ? "\n" : "", size_t(step), layers[i]);
    for (const Reading& r : readings[i])
      rows += std::isnan(r.value) ? ",nan" : text_of(",%.6g", r.value);
  }
  return rows;
}

// A run on one page, RUN/page.html, if the program runs where its source is: a script makes it.
inline void make_page(const std::string& run) {
  if (!fs::exists("data/page.sh")) return;
  setenv("RUN", run.c_str(), 1);
  if (std::system("bash data/page.sh \"$RUN\" >/dev/null") == 0)
    std::printf("page %s/page.html\n", visible(run).c_str());
  else
    std::fprintf(stderr, "warning: %s/page.html was not written\n", visible(run).c_str());
}

// What is known of a step whose gradient's norm stood out.
struct Spike {
  struct Mode {
    size_t layer;
    int writer;                         // 0: W_O, 1: W2
    double mean, centered;              // G_mean and G_ctr at this step
    double usual_mean, usual_centered;  // their medians over the steps before
  };
  uint64_t step;
  size_t window;  // how many steps before it the medians are over
  double norm, median, factor;
  std::vector<std::pair<std::string, double>> gradients;  // each parameter's name and norm
  Words bad_gradients, bad_weights;                       // those that hold NaN or infinity
  std::vector<double> losses;                             // each sample's
  double mean, rms, largest;                              // of dL/dvelocity, over the last pass
  std::vector<Mode> modes;
};

// One line: what kind of spike this is.
inline std::string verdict(const Spike& s) {
  if (!s.bad_gradients.empty()) return "not finite: the gradient of " + s.bad_gradients[0];
  if (!std::isfinite(s.norm)) return "not finite: the gradient's norm";
  // The writer whose mean part rose most, in numbers: where it was nearly zero any factor is large.
  const Spike::Mode* worst = nullptr;
  for (const Spike::Mode& m : s.modes)
    if (!worst || m.mean - m.usual_mean > worst->mean - worst->usual_mean) worst = &m;
  if (!worst) return "the writers' modes are not known";
  double mean = worst->mean / worst->usual_mean, centered = worst->centered / worst->usual_centered;
  // A step that is larger all over raises both parts alike; the mean mode raises one.
  const char* kind = mean > s.factor && mean > 3 * centered ? "mean mode"
                     : mean > s.factor                      ? "both modes"
                                                            : "not the writers' mean mode";
  return text_of("%s: G_mean of %s at layer %zu is %.3g times its running median, G_ctr %.3g times",
                 kind, worst->writer ? "W2" : "W_O", worst->layer, mean, centered);
}

// The `most` of all whose keys are largest, largest first and NaN before that.
template <class Any, class Key>
std::vector<Any> largest(std::vector<Any> all, const Key& key, size_t most = 15) {
  auto rank = [&](const Any& x) { return std::isnan(key(x)) ? HUGE_VAL : key(x); };
  std::stable_sort(all.begin(), all.end(),
                   [&](const Any& a, const Any& b) { return rank(a) > rank(b); });
  all.resize(std::min(all.size(), most));
  return all;
}

inline std::string spike_report(const Spike& s) {
  std::string text = text_of(
      "Spike at step %zu: gradient norm %.4g is %.3g times %.4g, the median of the %zu steps "
      "before (reported from %g times).\n",
      size_t(s.step), s.norm, s.norm / s.median, s.median, s.window, s.factor);
  text += "Verdict: " + verdict(s) + ".\n\n";

  text += "Largest gradients, layer by layer: norm, share of the squared total\n";
  for (const auto& [name, norm] : largest(s.gradients, [](const auto& g) { return g.second; }))
    text += text_of("  %-44s %12.4g %6.1f%%\n", name.c_str(), norm,
                    100 * (norm / s.norm) * (norm / s.norm));

  text += "\nWriters, largest G_mean first: G_mean (times its median), G_ctr (times its median)\n";
  for (const Spike::Mode& m : largest(s.modes, [](const Spike::Mode& m) { return m.mean; }))
    text += text_of("  layer %5zu %-4s %12.4g (%8.3g) %12.4g (%8.3g)\n", m.layer,
                    m.writer ? "W2" : "W_O", m.mean, m.mean / m.usual_mean, m.centered,
                    m.centered / m.usual_centered);

  auto list = [&](const char* what, const Words& bad) {
    text += text_of("%s with NaN or infinity: %zu\n", what, bad.size());
    for (size_t i = 0; i < std::min<size_t>(bad.size(), 15); ++i) text += "  " + bad[i] + "\n";
  };
  text += "\n";
  list("Gradients", s.bad_gradients), list("Weights after the step", s.bad_weights);

  text += text_of("\ndL/dvelocity, last pass: mean %.4g, root mean square %.4g, largest %.4g\n",
                  s.mean, s.rms, s.largest);
  std::vector<size_t> samples(s.losses.size());
  std::iota(samples.begin(), samples.end(), 0);
  text += "\nLosses, largest first: sample, loss\n";
  for (size_t i : largest(
           samples, [&](size_t i) { return s.losses[i]; }, samples.size()))
    text += text_of("  %6zu %10.4g\n", i, s.losses[i]);
  return text;
}

// What a probe of one kind of features at one layer found, with the labels and with shuffled ones.
struct ProbeRow {
  std::string layer, features;
  double r2, shuffled_r2, penalty;
};

// probe.csv: a comment that says what the numbers are of, the names, a row a layer and kind.
inline std::string probe_csv(const std::vector<ProbeRow>& rows, const Config& m, size_t fit,
                             size_t choose, size_t test) {
  std::string text = text_of(
      "# The time t, uniform in [0, 1] (0: data, 1: noise), read off a state by ridge regression.\n"
      "# Images, one sample each: %zu to fit, %zu to choose the penalty, then all of them to fit; "
      "%zu held-out ones to test.\n"
      "# layer: the input of this block; %zu: the trunk's output; z: the noisy image\n"
      "# image_mean (%zu): of the %zu image tokens, by channel; image_rms (%zu): root mean square "
      "about it\n"
      "# text_mean (%zu): of the %zu text tokens\n"
      "# scalars (5): mean, root mean square, standard deviation, smallest, largest number of z\n"
      "# r2: 1 - (squares of what is left of t) / (squares of t - its mean), of the held-out "
      "images\n"
      "# r2_shuffled: the same with t permuted among all samples\n"
      "# penalty: of squared weights beside the mean squared error, features standardised\n"
      "layer,features,r2,r2_shuffled,penalty\n",
      fit, choose, test, m.depth, m.width, m.image_tokens(), m.width, m.width, m.text_tokens);
  for (const ProbeRow& r : rows)
    text += text_of("%s,%s,%.6g,%.6g,%g\n", r.layer.c_str(), r.features.c_str(), r.r2,
                    r.shuffled_r2, r.penalty);
  return text;
}

// The same for the console: a line a layer.
inline std::string probe_table(const std::vector<ProbeRow>& rows) {
  std::string text, layer;
  for (const ProbeRow& r : rows) {
    if (r.layer != layer)
      text += text_of("%slayer %4s:", text.empty() ? "" : "\n", r.layer.c_str());
    text += text_of("  %s %7.4f (%6.3f)", r.features.c_str(), r.r2, r.shuffled_r2);
    layer = r.layer;
  }
  return text + "\n";
}

// Losses in a bin of t: how many, their sum, that of their squares.
struct LossBin {
  double n = 0, sum = 0, squares = 0;
};

// The mean loss of each bin, with its standard error; those of all images follow from the bins'.
inline std::string validation_table(const std::vector<LossBin>& bins, double images) {
  std::string text = "t               images     loss  standard error\n";
  double all = 0, variance = 0, width = 1 / double(bins.size());
  for (size_t k = 0; k < bins.size(); ++k) {
    auto [n, sum, squares] = bins[k];
    if (n == 0) continue;
    double mean = sum / n, rest = std::max(squares / n - mean * mean, 0.0);
    double error = n > 1 ? std::sqrt(rest / (n - 1)) : NAN;
    all += sum / images, variance += std::pow(error * n / images, 2);
    text += text_of("%.3f to %.3f %8.0f  %7.5f  %.5f\n", double(k) * width, double(k + 1) * width,
                    n, mean, error);
  }
  return text + text_of("all            %8.0f  %7.5f  %.5f\n", images, all, std::sqrt(variance));
}
