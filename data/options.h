// options.h - the options of the command line and of configuration files.
//
// What it is: one struct a subcommand, whose fields' initial values are the defaults; the names
// under which they are given; and the readers of a command line and of a file, which say what was
// wrong. What it is not: what the subcommands do (train.cu).
//
// How to read it: section 4 lists the options. CLI11 keeps their help, but does not read them: what
// it takes for a number or a list, and what it says, is another thing in each of its versions.
#pragma once

#include "../dit.cu"
#include "checkpoint.h"
#include "dataset.h"

#include <CLI/CLI.hpp>

// ---------------------------------------------------------------------------------------------
// 1. The options of each subcommand

// A number that an optimiser is set to: by which name in a state, by which flag, what the flag is
// for (null: there is none), and what it must be.
template <class Number>
struct Setting {
  const char *name, *flag, *about;
  Number& value;
  bool good = true;
  const char* must = "";
};
template <class Number, class... Rest>
Setting(const char*, const char*, const char*, Number&, Rest...) -> Setting<Number>;

struct Optimizer {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0.1, clip = 1;
  size_t warmup = 100, decay_steps = 0;

  // f(setting) for each: flags, limits, and what a state says follow from this list.
  template <class Self, class F>
  static void each(Self& o, const F& f) {
    const char *none = nullptr, *not_negative = "must be at least 0";
    f(Setting{"lr", "lr", "learning rate after warm-up", o.lr, o.lr > 0, "must be positive"});
    f(Setting{"warmup", "warmup", "first steps, in which the rate rises", o.warmup});
    f(Setting{"decay_steps", "decay-steps", "last steps, in which it falls", o.decay_steps});
    f(Setting{"decay", "weight-decay", "of matrices", o.decay, o.decay >= 0, not_negative});
    f(Setting{"clip", "clip", "largest gradient norm; 0: none", o.clip, o.clip >= 0, not_negative});
    f(Setting{"beta1", "beta1", none, o.beta1}), f(Setting{"beta2", "beta2", none, o.beta2});
    f(Setting{"eps", "eps", none, o.eps});
  }
};

constexpr size_t automatic = SIZE_MAX;  // --recompute: the memory decides

// An option of a run that goes on which is another than it was.
struct Change {
  std::string name, was, now;
};

struct TrainOptions {
  Config model;
  Optimizer optimizer;
  size_t batch = 32, accumulate = 1, steps = 1000, seed = 1;
  size_t recompute = automatic;
  std::string state = "auto";  // of the optimiser: fp32, lean
  double memory = 0;           // GB that may be taken; 0: what is free
  size_t val_images = 256, log_every = 10, val_every = 0, save_every = 0, sample_every = 0;
  size_t columns = 8;  // of a sample grid
  size_t diagnose_every = 0, diagnose_samples = 4;
  Words diagnose_layers;
  double spike_factor = 5;  // 0: no watch for spikes
  double dropout = 0.1, time_shift = 1, ema = 0;
  std::string data = FashionMnist::about, out = "run", save = "all";
  std::string weights;  // to begin with; empty: drawn ones
  bool resume = false;
  std::vector<Change> changes;  // against the config.ini in `out`
  std::string ini;              // what config.ini is to say; empty: it may stay as it is

  bool observes() const { return diagnose_every || spike_factor > 0; }
};

// How much of a data set goes to the device: training images, images to validate on, captions.
struct DataSizes {
  size_t images, held_out, captions;
};

struct Machine {
  std::string device = "auto", precision = "auto";

  bool gpu() const { return device == "gpu" || (device == "auto" && Device::gpus() > 0); }
  std::string chosen_precision() const {
    return precision != "auto" ? precision : gpu() && Device::has_bf16() ? "bf16" : "fp32";
  }
  // Call function(T{}) with T the storage type.
  template <class Function>
  int with_precision(const Function& function) const {
    std::string p = chosen_precision();
    if (p == "fp64") return function(double{});
    if (p == "fp32") return function(float{});
    return function(bf16{});
  }
};

// Of what reads weights: what their file may not say.
struct WeightsOptions {
  std::string weights;
  std::optional<size_t> heads;
  std::optional<double> norm_eps;
};

struct SampleOptions : WeightsOptions {
  std::string out = "grid.png", data;
  Words prompts;
  size_t steps = 25, columns = 8, seed = 1, batch = 64;
  std::optional<size_t> size, text_tokens;
  double guidance = 2;
  std::optional<double> time_shift;
};

struct ForwardOptions : WeightsOptions {
  std::string inputs, out;
  size_t recompute = 0;
};

struct GradcheckOptions {
  Config model;
  std::string weights;
  size_t batch = 1, recompute = 32, seed = 1;
  double step = 1.5e-3, tolerance = 1e-11;
};

constexpr size_t usual_probe = 4096;  // images

struct ProbeOptions : WeightsOptions {
  std::string data = FashionMnist::about, out = "probe.csv";
  size_t seed = 1, batch = 64;
  std::optional<size_t> images;
  Words layers;
};

struct ValidateOptions : WeightsOptions {
  std::string data = FashionMnist::about, out = "losses.csv";
  std::optional<size_t> images;
  std::optional<double> time_shift;
  size_t bins = 10, batch = 64;
};

// ---------------------------------------------------------------------------------------------
// 2. What they may be

// The layers that a flag's words name; by default five, spread from the first to the last.
inline std::vector<size_t> chosen_layers(const char* flag, const Words& words, size_t last) {
  std::set<size_t> layers;
  if (words.empty())
    for (size_t i = 0; i < 5; ++i) layers.insert((i * last + 2) / 4);
  for (const std::string& word : words) {
    auto layer = number_in<size_t>(word);
    if (word == "all")
      for (size_t i = 0; i <= last; ++i) layers.insert(i);
    else if (!layer || *layer > last)
      fail("%s: '%s' is not a layer: give numbers from 0 to %zu with commas, or all", flag,
           word.c_str(), last);
    else
      layers.insert(*layer);
  }
  return {layers.begin(), layers.end()};
}
inline std::vector<size_t> chosen_layers(const TrainOptions& o) {
  return chosen_layers("--diagnose-layers", o.diagnose_layers, o.model.depth - 1);
}

constexpr size_t longest_log_every = 924;  // the norms of more steps are not kept

// Fails unless they are in range. (Numbers that are given are finite.)
inline void check_options(const TrainOptions& o) {
  o.model.check();
  const std::pair<bool, const char*> rules[] = {
      {o.batch >= 1 && o.accumulate >= 1 && o.batch < 1 << 20 && o.accumulate < 1 << 20,
       "--batch and --accumulate must be from 1 to 1,048,575"},
      {o.log_every >= 1 && o.log_every <= longest_log_every, "--log-every must be from 1 to 924"},
      {o.optimizer.decay_steps <= o.steps, "--decay-steps must be at most --steps"},
      {o.dropout >= 0 && o.dropout <= 1, "--dropout must be a probability, from 0 to 1"},
      {o.ema >= 0 && o.ema < 1, "--ema must be at least 0 (off) and below 1"},
      {o.memory >= 0, "--memory must be at least 0"},
      {o.time_shift > 0, "--time-shift must be positive"},
      {o.val_images >= 1, "--val-images must be at least 1"},
      {o.diagnose_samples >= 1, "--diagnose-samples must be at least 1"},
      {o.spike_factor == 0 || o.spike_factor > 1, "--spike-factor must be 0 (off) or above 1"},
  };
  for (auto [good, what] : rules)
    if (!good) fail("%s", what);
  Optimizer::each(o.optimizer, [](auto s) {
    if (!s.good) fail("--%s %s", s.flag, s.must);
  });
  chosen_layers(o);
}

// ---------------------------------------------------------------------------------------------
// 3. Reading them
//
// An option has one name, `depth`: --depth 48 or --depth=48 among the words, depth = 48 in a file.
// What stands there is taken as it is: nothing is abbreviated, and lists alone are split.

// The one of that name, or null; and all names.
template <class Named>
const Named* find(const std::vector<Named>& all, const std::string& name) {
  for (const Named& one : all)
    if (one.name == name) return &one;
  return nullptr;
}
template <class Named>
Words names_of(const std::vector<Named>& all) {
  Words names;
  for (const Named& one : all) names.push_back(one.name);
  return names;
}

struct Option {
  enum Kind { flag, value, list, many };  // flag: alone it is true; many: each time one more
  std::string name;
  Kind kind;
  // Take the texts that were given. Returns what was expected where they are something else.
  std::function<std::string(const Words&)> read;
  std::function<std::string()> write;  // what read() takes for the value that it has
};

// The shortest text that take() reads as x.
template <class Number>
std::string shortest(Number x) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, x).ptr};
}
inline std::string shortest(const std::string& x) { return x; }
template <class Number>
std::string shortest(const std::optional<Number>& x) {
  return x ? shortest(*x) : "";
}

// x becomes what a text says. Returns what was expected where that is something else.
inline std::string take(const std::string& text, double& x) {
  auto number = number_in<double>(text);
  if (number && std::fabs(*number) > 3.4e38) return "a number below 3.4e38, which fp32 holds";
  if (number) x = *number;
  return number ? "" : "a decimal number that a double holds, such as 0.001 or 1e-3";
}
inline std::string take(const std::string& text, size_t& x, size_t least = 0,
                        size_t most = SIZE_MAX) {
  auto number = number_in<size_t>(text);
  if (number && *number >= least && *number <= most) return x = *number, "";
  return "a whole number in decimal digits, " +
         (most < SIZE_MAX ? text_of("from %zu to %zu", least, most) : "below 2^64");
}
inline std::string take(const std::string& text, std::string& x, const Words& choices = {}) {
  x = text;
  bool known = choices.empty() || std::count(choices.begin(), choices.end(), x);
  return known ? "" : "one of " + join_list(choices, ", ");
}
template <class Number>
std::string take(const std::string& text, std::optional<Number>& x) {
  return take(text, x.emplace());
}

// The words of a list, which may have been written with brackets, quotes or blanks.
inline Words split_list(const Words& texts) {
  std::string all = join_list(texts, " ");
  for (char& c : all)
    if (std::strchr(",[]\"'", c)) c = ' ';
  return words_in(all);
}

// A subcommand's options, with their help.
class Subcommand {
 public:
  Subcommand(CLI::App& program, const std::string& name, const std::string& about,
             const Words& required = {})
      : name(name), required(required), app_(program.add_subcommand(name, about)) {
    keep({"config", Option::value, [](const Words&) { return ""; }, [] { return ""; }}, "FILE",
         "options from a file: [" + name + "], then depth = 400 and so on");
  }
  std::string name;
  Words required;  // options
  std::vector<Option> options;

  std::string help() const { return app_->help("mvsplit"); }
  const Option* find(const std::string& option) const { return ::find(options, option); }

  // A number, within limits, or a text, one of some.
  template <class Value, class... Limits>
  void add(const std::string& option, Value& x, const std::string& about, Limits... limits) {
    const bool text = std::is_same_v<Value, std::string>;
    const bool real = std::is_same_v<Value, double> || std::is_same_v<Value, std::optional<double>>;
    const char* type = text ? "TEXT" : real ? "FLOAT" : "UINT";
    auto read = [=, &x](const Words& texts) { return take(texts[0], x, limits...); };
    keep({option, Option::value, read, [&] { return shortest(x); }}, type, about);
  }
  // A size or, by its name, what is chosen for one.
  void add_or_auto(const char* option, size_t& x, const char* about) {
    auto read = [&](const Words& texts) {
      if (texts[0] == "auto") return x = automatic, std::string();
      std::string expected = take(texts[0], x, 0, 100000);
      return expected.empty() ? expected : expected + ", or auto";
    };
    auto write = [&] { return x == automatic ? "auto" : std::to_string(x); };
    keep({option, Option::value, read, write}, "UINT|auto", about);
  }
  // x becomes `meaning` where the flag is set.
  void add_flag(const char* option, bool& x, const char* about, bool meaning = true) {
    auto read = [=, &x](const Words& texts) {
      x = (texts.back() == "true") == meaning;
      return texts.back() == "true" || texts.back() == "false" ? "" : "true or false";
    };
    app_->add_flag(std::string("--") + option, std::as_const(about));
    options.push_back(
        {option, Option::flag, read, [=, &x] { return x == meaning ? "true" : "false"; }});
  }
  // A list of words; of kind `many`, of texts. x is a set or a vector.
  template <class Container>
  void add_list(const char* option, Container& x, const std::string& about,
                Option::Kind kind = Option::list) {
    auto read = [=, &x](const Words& texts) {
      const Words all = kind == Option::list ? split_list(texts) : texts;
      x = Container(all.begin(), all.end());
      return "";
    };
    const char* type = kind == Option::list ? "TEXT,..." : "TEXT ...";
    keep({option, kind, read, [&] { return join_list(x); }}, type, about);
  }

 private:
  CLI::App* app_;

  void keep(const Option& o, const char* type, const std::string& about) {
    auto* shown = app_->add_option("--" + o.name, CLI::callback_t(), about);
    shown->type_name(type)->default_str(o.write());
    shown->required(std::count(required.begin(), required.end(), o.name));
    options.push_back(o);
  }
};

// 3.1 What is not known

// How many letters to change, add, leave out or swap with the next make one word the other.
inline size_t edits(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i)
    for (size_t j = 0; j <= b.size(); ++j) {
      d[i][j] = !i || !j ? i + j
                         : std::min({d[i - 1][j] + 1, d[i][j - 1] + 1,
                                     d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  return d[a.size()][b.size()];
}

// "; did you mean NAME?" for the name that is most like the word, if one is.
inline std::string like(const std::string& word, const Words& names,
                        const std::string& dashes = "") {
  std::string best;
  size_t least = word.size() / 4 + 2;
  for (const std::string& name : names) {
    if (word.size() > 40) break;
    bool begins = word.size() > 2 && name.rfind(word, 0) == 0;
    size_t n = begins ? 1 : edits(word, name);
    if (n < least) least = n, best = name;
  }
  return best.empty() ? "" : "; did you mean " + dashes + best + "?";
}

// The option `name` of `sub`; fails where there is none. `place`: where it stands in a file, or "".
inline const Option* known(const Subcommand& sub, const std::vector<Subcommand>& all,
                           const std::string& name, const std::string& place) {
  if (const Option* o = sub.find(name)) return o;
  const char* dashes = place.empty() ? "--" : "";
  Words others;
  for (const Subcommand& other : all)
    if (other.find(name)) others.push_back(other.name);
  std::string hint = others.empty() ? like(name, names_of(sub.options), dashes)
                                    : ", but of " + join_list(others, ", ");
  if (hint.empty()) hint = " (mvsplit " + sub.name + " --help lists them)";
  fail("%s'%s%s' is no option of %s%s", place.c_str(), dashes, name.c_str(), sub.name.c_str(),
       hint.c_str());
}

// 3.2 What was given

struct Given {
  std::string place;  // in a file; empty: among the words
  Words texts;
};
using GivenOptions = std::map<std::string, Given>;

// Take what was given for the options of `sub`. Fails on what they cannot be.
inline void set_options(const Subcommand& sub, const GivenOptions& given) {
  for (const Option& o : sub.options) {
    auto at = given.find(o.name);
    if (at == given.end()) continue;
    const Given& g = at->second;
    std::string expected = o.read(g.texts);
    if (!expected.empty())
      fail(g.place.empty() ? "%s--%s %s: expected %s" : "%s%s = %s: expected %s", g.place.c_str(),
           o.name.c_str(), g.texts.back().empty() ? "''" : g.texts.back().c_str(),
           expected.c_str());
  }
}

struct CommandLine {
  const Subcommand* sub = nullptr;  // null: help on all of them is asked for
  bool help = false;
  GivenOptions given;
};

// Where the subcommand stands among the words: --config may come before it.
inline size_t subcommand_at(const Words& words) {
  size_t at = 0;
  while (at < words.size() && words[at].rfind("--config", 0) == 0)
    at += words[at] == "--config" ? 2 : 1;
  return at;
}

// The words behind the program's name. Fails on what is unknown, in excess or missing.
inline CommandLine read_words(Words words, const std::vector<Subcommand>& all) {
  const std::string choices = ": choose one of " + join_list(names_of(all), ", ");
  size_t at = subcommand_at(words);
  if (at >= words.size()) fail("no subcommand%s", choices.c_str());
  const std::string name = words[at];
  CommandLine line;
  if (name == "--help" || name == "-h") return line;
  line.sub = find(all, name);
  if (!line.sub)
    fail("'%s' is not a subcommand%s%s", name.c_str(), choices.c_str(),
         like(name, names_of(all)).c_str());
  words.erase(words.begin() + ptrdiff_t(at));
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string word = words[i];
    line.help = word == "--help" || word == "-h";
    if (line.help) break;
    if (find(all, word)) fail("%s and %s: give one subcommand", name.c_str(), word.c_str());
    if (word.empty() || word[0] != '-')
      fail("'%s' was not expected: a value that has blanks needs quotes", word.c_str());
    if (word.find_first_not_of('-') != 2)  // one dash, or three, or nothing but dashes
      fail("'%s' was not expected: options begin with two dashes, as --steps does", word.c_str());
    const size_t equals = word.find('=');
    const Option& o = *known(*line.sub, all, word.substr(2, equals - 2), "");
    Words& texts = line.given[o.name].texts;
    if (equals != std::string::npos) {
      texts.push_back(word.substr(equals + 1));
    } else if (o.kind == Option::flag) {
      texts.push_back("true");
    } else {
      if (++i == words.size() ||
          (words[i].rfind("--", 0) == 0 && line.sub->find(words[i].substr(2))))
        fail("--%s needs a value", o.name.c_str());
      texts.push_back(words[i]);
    }
    if ((o.kind == Option::value || o.kind == Option::flag) && texts.size() > 1)
      fail("--%s is given twice, as %s and as %s: leave one out", o.name.c_str(), texts[0].c_str(),
           texts[1].c_str());
  }
  return line;
}

// 3.3 Configuration files
//
//     # a comment; so is what follows a blank and # or ;
//     [train]
//     depth = 400
//     data = "a text # in quotes, which are JSON's"

inline std::string trimmed(const std::string& text) {
  size_t first = text.find_first_not_of(" \t"), last = text.find_last_not_of(" \t");
  return first == std::string::npos ? "" : text.substr(first, last + 1 - first);
}
inline bool is_comment(const std::string& text) {
  return text.empty() || text[0] == '#' || text[0] == ';';
}

// The value that stands behind an equals sign, without its quotes and the comment behind it. What
// belongs to a list keeps its quotes. `place` is for errors.
inline std::string ini_value(const std::string& text, bool list, const std::string& place) {
  const std::string rest = trimmed(text);
  const char quote = rest.empty() || list ? ' ' : rest[0];
  if (quote != '"' && quote != '\'') {
    size_t end = text.find_first_of("#;");
    while (end < text.size() && (end == 0 || !std::strchr(" \t", text[end - 1])))
      end = text.find_first_of("#;", end + 1);
    return trimmed(text.substr(0, end));
  }
  size_t end = 1;
  while (end < rest.size() && rest[end] != quote) end += quote == '"' && rest[end] == '\\' ? 2 : 1;
  if (end >= rest.size()) fail("%sthe quote %c has no partner", place.c_str(), quote);
  if (!is_comment(trimmed(rest.substr(end + 1))))
    fail("%s'%s' follows the quotes", place.c_str(), trimmed(rest.substr(end + 1)).c_str());
  if (quote == '\'') return rest.substr(1, end - 1);
  try {
    std::string value = nlohmann::json::parse(rest.substr(0, end + 1));
    if (value.find('\0') == std::string::npos) return value;
  } catch (const nlohmann::json::exception&) {
  }
  fail("%s%s is no text: write \\\\ for a backslash, or single quotes", place.c_str(),
       rest.substr(0, end + 1).c_str());
}
inline std::string ini_line(const std::string& name, const std::string& text) {
  bool plain = std::all_of(text.begin(), text.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("./_+-,", c);
  });
  try {
    return name + "=" + (plain ? text : nlohmann::json(text).dump()) + "\n";
  } catch (const nlohmann::json::exception&) {
    fail("--%s %s is not UTF-8, as a configuration file is: give another name", name.c_str(),
         text.c_str());
  }
}

// What a file gives, by subcommand. Fails on what is no such file, and on names that no subcommand
// has; whether values are what they must be is seen where they are set.
inline std::map<std::string, GivenOptions> read_ini(const std::string& path,
                                                    const std::vector<Subcommand>& all) {
  if (path.empty()) fail("--config must name a file");
  std::error_code none;
  if (size_t size = fs::file_size(path, none); !none && size >= 1 << 20)
    fail("%s is too large for a configuration file", path.c_str());
  std::string text = read_text(path, true);
  if (text.rfind("\xff\xfe", 0) == 0 || text.rfind("\xfe\xff", 0) == 0)
    fail("%s is UTF-16: save it as UTF-8", path.c_str());
  if (text.rfind("\xef\xbb\xbf", 0) == 0) text.erase(0, 3);  // a byte-order mark

  std::map<std::string, GivenOptions> sections;
  const Subcommand* section = nullptr;
  std::istringstream lines(text);
  size_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string place = path + ":" + std::to_string(++number) + ": ";
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.find('\0') != std::string::npos)
      fail("%sthere is a zero byte: save the file as text in UTF-8", place.c_str());
    line = trimmed(line);
    if (is_comment(line)) continue;
    if (line[0] == '[') {
      size_t end = line.find(']');
      if (end == std::string::npos || !is_comment(trimmed(line.substr(end + 1))))
        fail("%s'%s' is no section: expected [train] alone, or the like", place.c_str(),
             line.c_str());
      std::string name = trimmed(line.substr(1, end - 1));
      section = find(all, name);
      if (!section)
        fail("%sthere is no section [%s]: choose one of %s%s", place.c_str(), name.c_str(),
             join_list(names_of(all), ", ").c_str(), like(name, names_of(all)).c_str());
      sections[name];
      continue;
    }
    size_t equals = line.find('=');
    std::string name = trimmed(line.substr(0, equals));
    if (!section)
      fail("%s'%s' stands before the first section: begin with [train], or the like", place.c_str(),
           name.c_str());
    if (name == "config") fail("%sa configuration file cannot name another", place.c_str());
    const Option& o = *known(*section, all, name, place);
    if (equals == std::string::npos)
      fail("%s'%s' has no value: expected %s = ...", place.c_str(), line.c_str(), name.c_str());
    Given& given = sections[section->name][name];
    if (!given.texts.empty() && o.kind != Option::many)
      fail("%s%s is given twice: leave one out", place.c_str(), name.c_str());
    given.place = place;
    given.texts.push_back(ini_value(line.substr(equals + 1), o.kind == Option::list, place));
  }
  return sections;
}

// ---------------------------------------------------------------------------------------------
// 4. The options

// Where the gates of a name start, by merge; and the names.
inline std::map<std::string, Words> gate_starts() {
  std::map<std::string, Words> starts;
  Merges::each([&](auto m) {
    for (const Gate& gate : decltype(m)::gates)
      starts[gate.name].push_back(decltype(m)::name + (" " + shortest(gate.start)));
  });
  return starts;
}
inline std::set<std::string> gate_names() {
  std::set<std::string> names;
  for (const auto& gate : gate_starts()) names.insert(gate.first);
  return names;
}

// The sizes of a network; those of the data are for the subcommands that have none.
inline void add_sizes(Subcommand& sub, Config& m, bool of_data) {
  for (const Size& size : sizes_of(m))
    if (size.of_data == of_data) sub.add(swapped(size.name, '_', '-'), size.value, size.about);
}

inline void add_model_options(Subcommand& sub, Config& m) {
  add_sizes(sub, m, false);
  sub.add("residual", m.residual, join_list(names_of(residuals)));
  sub.add("means", m.means,
          "that MV-Split takes: segment, of image and of text tokens; global, of all");
  for (const auto& [name, starts] : gate_starts())
    sub.add(name, m.gates[name], "where this gate starts: " + join_list(starts, ", "));
  sub.add("writer-std", m.writer_std, "W_O and W2 start as N(0, std^2); -1: the mode's own");
  sub.add("xavier-gain", m.xavier_gain,
          "above 0: blocks start as N(0, gain^2 2 / (in + out)), W_Q and W_K with gain 1");
  sub.add("final-std", m.final_std, "the final projection starts as N(0, std^2)");
  sub.add_flag("no-patch-bias", m.patch_bias, "no bias in the patch embedding", false);
  sub.add("norm-eps", m.norm_eps, "epsilon of the RMSNorms");
}

inline void add_train_options(Subcommand& sub, TrainOptions& o) {
  add_model_options(sub, o.model);
  sub.add_list("fix", o.model.fix, "gates that are not trained: " + join_list(gate_names()));
  sub.add("batch", o.batch, "images of a forward pass");
  sub.add("accumulate", o.accumulate, "passes of a step");
  sub.add("steps", o.steps, "steps, from the start of the run");
  Optimizer::each(o.optimizer, [&](auto s) {
    if (s.about) sub.add(s.flag, s.value, s.about);
  });
  sub.add_or_auto(
      "recompute", o.recompute,
      "0: keep all activations; k: a checkpoint every k blocks; auto: as memory allows");
  sub.add("state", o.state,
          "of the optimiser: fp32; lean, 10 bytes a parameter; auto: as memory allows",
          Words{"auto", "fp32", "lean"});
  sub.add("memory", o.memory, "GB that may be taken; 0: what is free");
  sub.add("dropout", o.dropout, "share of captions left out");
  sub.add("time-shift", o.time_shift, "a in t' = a t / (1 + (a-1) t)");
  sub.add("ema", o.ema, "decay of the weights' average; 0: none");
  sub.add("seed", o.seed, "of everything random");
  sub.add("data", o.data, about_data());
  sub.add("diagnose-every", o.diagnose_every, "steps a row of diagnostics.csv; 0: none");
  sub.add_list("diagnose-layers", o.diagnose_layers,
               "0,99,199 or all; default: five, from the first to the last");
  sub.add("diagnose-samples", o.diagnose_samples, "of a batch, to measure");
  sub.add("spike-factor", o.spike_factor,
          "report a gradient norm this many times its running median; 0: never");
}

inline void add_machine_options(Subcommand& sub, Machine& machine, bool precision = true) {
  sub.add("device", machine.device, "where: auto, cpu, gpu", Words{"auto", "cpu", "gpu"});
  if (!precision) return;
  sub.add("precision", machine.precision,
          "of storage: fp64, fp32, bf16; auto: bf16 on a GPU from 8.0 on, else fp32",
          Words{"auto", "fp64", "fp32", "bf16"});
}

inline Subcommand add_train(CLI::App& app, TrainOptions& o, Machine& machine) {
  Subcommand sub(app, "train", "train a model");
  add_train_options(sub, o);
  sub.add("weights", o.weights, "begin with this network instead of a drawn one");
  sub.add("out", o.out, "folder of the run");
  sub.add_flag("resume", o.resume,
               "go on from --out, if there is a run in it, with the options that it has");
  sub.add("val-images", o.val_images, "held-out images");
  sub.add("log-every", o.log_every, "steps a line");
  sub.add("val-every", o.val_every, "steps; 0: at the end");
  sub.add("save-every", o.save_every, "steps; 0: at the end");
  sub.add("save", o.save, "all; weights: without what --resume needs", Words{"all", "weights"});
  sub.add("sample-every", o.sample_every, "steps; 0: at the end");
  sub.add("columns", o.columns, "images of a row", 1, 1000);
  add_machine_options(sub, machine);
  return sub;
}

inline void add_weights(Subcommand& sub, WeightsOptions& o) {
  sub.add("weights", o.weights, "a weights.safetensors, or the index of a sharded one");
  sub.add("heads", o.heads, "if the file does not say");
  sub.add("norm-eps", o.norm_eps, "default: as in the weights, or 1e-6");
}

inline Subcommand add_sample(CLI::App& app, SampleOptions& o, Machine& machine) {
  Subcommand sub(app, "sample", "draw images, a row a prompt", {"weights", "prompt"});
  add_weights(sub, o);
  sub.add_list("prompt", o.prompts, "what to draw; with --data, a caption's words or number",
               Option::many);
  sub.add("data", o.data, "captions' data set, or a .safetensors that holds only text");
  sub.add("out", o.out, ".png, or .safetensors for raw numbers");
  sub.add("columns", o.columns, "images of a row", 1, 1000);
  sub.add("steps", o.steps, "Euler steps", 1, 100000);
  sub.add("cfg", o.guidance, "guidance; 1: none");
  sub.add("time-shift", o.time_shift, "default: as trained");
  sub.add("seed", o.seed, "of the noise");
  sub.add("batch", o.batch, "images at once", 1, 100000);
  sub.add("size", o.size, "pixels a side, if the file does not say");
  sub.add("text-tokens", o.text_tokens, "if the file does not say");
  add_machine_options(sub, machine);
  return sub;
}

inline Subcommand add_forward(CLI::App& app, ForwardOptions& o, Machine& machine) {
  Subcommand sub(app, "forward", "velocity and gradients for given inputs",
                 {"weights", "inputs", "out"});
  add_weights(sub, o);
  sub.add("inputs", o.inputs, "z, text and optionally cotangent");
  sub.add("out", o.out, "velocity, grad.*");
  sub.add("recompute", o.recompute, "a checkpoint every k blocks; 0: keep all");
  add_machine_options(sub, machine);
  return sub;
}

inline Subcommand add_probe(CLI::App& app, ProbeOptions& o, Machine& machine) {
  Subcommand sub(app, "probe", "how well the time can be read off the states", {"weights"});
  add_weights(sub, o);
  sub.add("data", o.data, about_data());
  sub.add("out", o.out, "a csv, a row a layer and kind of features");
  sub.add("images", o.images,
          "one sample each; a quarter of them held out, to test on; default: 4096, or as many as "
          "there are");
  sub.add_list("layers", o.layers,
               "0,99,199 or all: block inputs, and as layer DEPTH the trunk's output; default: "
               "five, from the first to the last");
  sub.add("seed", o.seed, "of the choice of images, the times and the noise");
  sub.add("batch", o.batch, "images at once", 1, 100000);
  add_machine_options(sub, machine);
  return sub;
}

inline Subcommand add_validate(CLI::App& app, ValidateOptions& o, Machine& machine) {
  Subcommand sub(app, "validate", "the loss on held-out images by time, with the noise of train's",
                 {"weights"});
  add_weights(sub, o);
  sub.add("data", o.data, about_data());
  sub.add("out", o.out, "a csv, a row an image: its time and its loss");
  sub.add("images", o.images, "held-out images; default: all");
  sub.add("bins", o.bins, "of the time from 0 to 1, a row of the table each", 1, 1000);
  sub.add("time-shift", o.time_shift, "default: as trained");
  sub.add("batch", o.batch, "images at once", 1, 100000);
  add_machine_options(sub, machine);
  return sub;
}

inline Subcommand add_gradcheck(CLI::App& app, GradcheckOptions& o, Machine& machine) {
  o.model.depth = 1000, o.model.width = 16, o.model.heads = 2, o.model.ffn = 24;
  o.model.channels = 2, o.model.height = 4, o.model.image_width = 6, o.model.patch = 2;
  o.model.text_tokens = 3, o.model.text_dim = 5;
  for (const std::string& gate : gate_names()) o.model.gates[gate] = gate == "alpha" ? 0.03 : 0.1;
  o.model.writer_std = 0.25, o.model.final_std = 0.25;
  Subcommand sub(app, "gradcheck",
                 "gradients of the whole network, by dual numbers and differences");
  sub.add("weights", o.weights, "trained ones; a small --height and --image-width save memory");
  add_model_options(sub, o.model);
  add_sizes(sub, o.model, true);
  sub.add("batch", o.batch, "images", 1, 1024);
  sub.add("recompute", o.recompute, "a checkpoint every k blocks");
  sub.add("step", o.step, "of the differences, relative to the values; 0: no differences");
  sub.add("tolerance", o.tolerance, "largest relative error against dual numbers");
  sub.add("seed", o.seed, "of everything random");
  add_machine_options(sub, machine, false);
  return sub;
}

inline Subcommand add_plan(CLI::App& app, TrainOptions& o, DataSizes& sizes, Machine& machine) {
  Subcommand sub(app, "plan", "bytes and FLOP of a step, without taking them");
  add_train_options(sub, o);
  add_sizes(sub, o.model, true);
  sub.add("images", sizes.images, "training images");
  sub.add("captions", sizes.captions, "different captions");
  sub.add("val-images", o.val_images, "held-out images");
  add_machine_options(sub, machine);
  return sub;
}

// 4.1 Of a run that goes on

// Does an option say where drawn parameters start?
inline bool is_start(const std::string& option) {
  return gate_names().count(option) || ends_with(option, "-std") || option == "xavier-gain";
}

// Is an option of train kept with the run? All but where the run is, and starts that it has not.
inline bool is_kept(const std::string& option, const TrainOptions& o) {
  if (is_start(option))
    return o.weights.empty() && (!gate_names().count(option) || o.model.has_gate(option));
  return option != "config" && option != "out" && option != "resume";
}

// The text of DIR/config.ini, all that is kept: `mvsplit train --config` repeats the run by it.
inline std::string ini_of(TrainOptions o, Machine machine, const char* state) {
  o.state = state, machine.precision = machine.chosen_precision();
  for (const Gate& gate : o.model.gates_of_mode()) o.model.gates[gate.name] = o.model.start(gate);
  CLI::App app;
  const Subcommand train = add_train(app, o, machine);
  std::string text =
      "# What this run was made with; `mvsplit train --resume --out` this folder goes on with it.\n"
      "[train]\n";
  for (const Option& option : train.options)
    if (is_kept(option.name, o)) text += ini_line(option.name, option.write());
  return text;
}

// Set the options of `train`, whose folder holds a config.ini: by this file, and above it by what
// is given. Lists in o.changes what is other than the file says. Returns what this gives.
inline GivenOptions set_resumed(const Subcommand& train, const std::vector<Subcommand>& all,
                                GivenOptions given, TrainOptions& o) {
  const std::string out = o.out, path = out + "/config.ini";
  GivenOptions kept = read_ini(path, all)["train"];
  if (kept.empty())
    fail("%s has no options of train: put them back, or remove it and give them as flags",
         path.c_str());
  set_options(train, kept);
  std::map<std::string, std::string> was;
  for (const Option& option : train.options) was[option.name] = option.write();
  for (const char* name : {"precision", "state"})  // what was chosen stays
    if (given.count(name) && given[name].texts[0] == "auto") given.erase(name);
  set_options(train, given);
  o.out = out, o.resume = true;
  Words silent;
  for (const Option& option : train.options) {
    const std::string &name = option.name, now = option.write();
    if (kept.count(name) && now != was[name]) o.changes.push_back({name, was[name], now});
    if (!kept.count(name) && !given.count(name) && is_kept(name, o)) silent.push_back(name);
  }
  std::printf("options that are not given are those of %s\n", visible(path).c_str());
  if (!silent.empty())
    std::printf("note: it does not say %s: their defaults are taken\n",
                join_list(silent, ", ").c_str());
  return kept;
}

// 4.2 Of a network that is read

// Fails if it is said where its parameters start.
inline void refuse_starts(const GivenOptions& given, const std::string& weights) {
  for (const auto& option : given)
    if (is_start(option.first) && !weights.empty())
      fail("--%s is where a drawn network starts, not that of --weights %s", option.first.c_str(),
           weights.c_str());
}

// Set the options of `train` that the file o.weights says, and above it by what is given. Fails,
// naming all that is given and not as in the file's tensors.
inline void set_by_weights(const Subcommand& train, const GivenOptions& given, TrainOptions& o) {
  std::map<const Option*, std::string> asked;
  for (const Option& option : train.options)
    if (given.count(option.name)) asked[&option] = option.write();
  const SafetensorsReader file(o.weights);
  std::optional<size_t> heads;
  if (given.count("heads") && !file.metadata().count("heads")) heads = o.model.heads;
  Words assumed = read_config(file, o.weights, o.model, heads);
  if (!given.count("time-shift")) o.time_shift = read_time_shift(file, o.weights, {}, assumed);
  auto tensors = [&](Config c, const std::string& residual) {
    c.depth = 1, c.residual = residual;
    std::set<std::string> all;
    for (const Parameter& p : parameter_table(c).parameters)
      all.insert(p.name + " " + exact(p.count()));
    return all;
  };
  const std::set<std::string> shapes = {"depth", "width", "heads", "ffn", "patch", "no-patch-bias"};
  std::string others;
  for (const auto& [option, now] : asked) {
    const std::string &name = option->name, was = option->write();
    bool fits = name == "residual" ? tensors(o.model, now) == tensors(o.model, was)
                                   : now == was || !shapes.count(name);
    if (!fits) others += (others.empty() ? "" : ", ") + name + " = " + was + " (not " + now + ")";
    option->read({now});
  }
  if (!others.empty()) fail("--weights %s has %s", o.weights.c_str(), others.c_str());
  note_assumed(o.weights, assumed);
}
