// state.h - saving a run, and going on with it.
//
// What it is: what a state must say for a resumed run to be the same run, and the files of both.
// weights.safetensors holds the network in Real under the published names; ema.safetensors the
// averaged one. state.safetensors is all that a run needs to go on: master weights (lean: the
// weights and the rests), moments, average, step.
// What it is not: the trainer `t`, whose arrays these are (train.cu, appendix D).
//
// How to read it: save_run() and resume_run(), then require_same_run() for what may have changed.
#pragma once

#include "checkpoint.h"
#include "dataset.h"
#include "options.h"

// What must be the same for a resumed run to be the same run. Not the optimiser's settings: a run
// may go on at another learning rate, with bits that are not those of an unbroken one.
template <class Real>
Metadata describe_state(const TrainOptions& o, bool lean, uint64_t data_hash, size_t val_images,
                        uint64_t val_images_hash) {
  Metadata m = describe(o.model, o.time_shift);
  m["batch"] = std::to_string(o.batch), m["accumulate"] = std::to_string(o.accumulate);
  m["seed"] = std::to_string(o.seed), m["data_hash"] = std::to_string(data_hash);
  m["val_images"] = std::to_string(val_images);
  m["val_images_hash"] = std::to_string(val_images_hash);
  m["precision"] = sizeof(Real) == 8 ? "fp64" : sizeof(Real) == 4 ? "fp32" : "bf16";
  m["state"] = lean ? "lean" : "fp32";
  m["dropout"] = exact(o.dropout), m["ema"] = exact(o.ema);
  m["fix"] = o.model.fix.empty() ? "nothing" : join_list(o.model.fix);
  // Where it began: what has been learned since then hides it.
  m["no_patch_bias"] = o.model.patch_bias ? "false" : "true";
  m["weights"] = o.weights.empty() ? "nothing" : o.weights;
  if (!o.weights.empty()) return m;
  m["writer_std"] = exact(o.model.writer_std), m["final_std"] = exact(o.model.final_std);
  m["xavier_gain"] = exact(o.model.xavier_gain);
  for (const Gate& gate : o.model.gates_of_mode()) m[gate.name] = exact(o.model.start(gate));
  return m;
}
// The entry `key` of a state's metadata. Throws Error where there is none.
inline std::string described(const SafetensorsReader& file, const std::string& path,
                             const std::string& key) {
  auto at = file.metadata().find(key);
  if (at == file.metadata().end()) fail("%s: metadata '%s' is missing", path.c_str(), key.c_str());
  return at->second;
}

// Call f with the slabs that a resumed run needs. (Wide types first, as files like it.)
template <class Trainer, class F>
void with_state(Trainer& t, const F& f) {
  auto& a = t.a;
  Stored average{"ema.", a.average};
  Stored own{t.lean ? "rest." : "master.", a.master.own};
  Stored weights{"weights.", t.lean ? a.master.weights : nullptr};
  std::apply([&](auto... slot) { f(average, own, weights, slot...); }, t.slots());
}

// Write state.safetensors (unless only weights are wanted), weights.safetensors and, if there is an
// average, ema.safetensors.
template <class Trainer>
void save_run(Trainer& t) {
  Metadata about = describe(t.o.model, t.o.time_shift),
           state = describe_state<typename Trainer::Number>(t.o, t.lean, t.data_hash,
                                                            t.held_out.images, t.validated_hash);
  about["step"] = state["step"] = std::to_string(t.step);
  about["captions"] = t.words ? "words" : "file";
  Optimizer::each(t.o.optimizer, [&](auto s) { state[s.name] = exact(s.value); });
  auto save = [&](const char* name, const Metadata& metadata, const auto&... slabs) {
    save_tensors(t.o.out + name, metadata, t.device, t.net.table, slabs...);
  };
  // State first: a kill in between leaves old weights, which the resumed run writes anew.
  if (t.o.save == "all")
    with_state(t, [&](auto... slabs) { save("/state.safetensors", state, slabs...); });
  save("/weights.safetensors", about, Stored{"", t.net.weights()});
  if (t.a.average) save("/ema.safetensors", about, Stored{"", t.evaluated_weights()});
}

// Fails unless the disk has room for the file that the work will be in: better now than after it.
// (A new one is written beside an old one.)
template <class Trainer>
void require_room(Trainer& t) {
  bool all = t.o.save == "all", twice = t.o.save_every && t.o.save_every < t.o.steps;
  std::string path = t.o.out + (all ? "/state.safetensors" : "/weights.safetensors");
  size_t bytes = t.net.table.count() * sizeof(*t.net.weights());
  if (all)
    with_state(t, [&](auto... stored) {
      bytes = t.net.table.count() * ((stored.slab ? sizeof(*stored.slab) : 0) + ...);
    });
  SafeFile(path, bytes * (twice && !fs::exists(path) ? 2 : 1)).abandon();
}

// Fails, naming all differences, if a run with these options would not be the one whose state is in
// the file. Says what else has changed.
template <class Real>
void require_same_run(const SafetensorsReader& file, const std::string& path, const TrainOptions& o,
                      const Dataset& data, const Dataset& validation) {
  // A number as it was typed, not with all the digits that a double has.
  auto typed = [](const std::string& text) {
    auto number = number_in<double>(text);
    return number && !number_in<size_t>(text) ? shortest(*number) : visible(text);
  };
  size_t V = std::min(o.val_images, validation.images);
  bool lean = (o.state == "auto" ? described(file, path, "state") : o.state) == "lean";
  const uint64_t hashes[] = {hash_data(data), hash_data(every_nth(validation, V))};
  // A state need not say what no bit of it depends on any more, nor that its rate does not fall.
  std::set<std::string> optional = {"val_images", "val_images_hash", "no_patch_bias",
                                    "writer_std", "final_std",       "xavier_gain",
                                    "weights",    "decay_steps"};
  for (const Gate& gate : o.model.gates_of_mode()) optional.insert(gate.name);
  auto said = [&](const std::string& key, const std::string& otherwise) {
    return optional.count(key) && !file.metadata().count(key) ? otherwise
                                                              : described(file, path, key);
  };
  Words others;
  for (const auto& [key, value] : describe_state<Real>(o, lean, hashes[0], V, hashes[1])) {
    std::string was = said(key, value);
    if (was == value) continue;
    others.push_back(key == "data_hash"         ? "other images or captions than " + o.data + " has"
                     : key == "val_images_hash" ? "other held-out images than " + o.data + " has"
                                                : swapped(key, '_', '-') + " = " + typed(was) +
                                                      " (now " + typed(value) + ")");
  }
  if (!others.empty())
    fail("%s was made with %s: resume with the same, or choose another --out", path.c_str(),
         join_list(others, ", ").c_str());
  auto note = [&](const std::string& name, const std::string& was, const std::string& now) {
    if (was != now)
      std::printf("note: %s was %s and goes on as %s\n", name.c_str(), typed(was).c_str(),
                  typed(now).c_str());
  };
  std::set<std::string> settings;
  Optimizer::each(o.optimizer, [&](auto s) {
    note(s.flag, said(s.name, "0"), exact(s.value));
    settings.insert(s.flag);
  });
  for (const Change& c : o.changes)
    if (!settings.count(c.name) && !file.metadata().count(swapped(c.name, '-', '_')))
      note(c.name, c.was, c.now);
}

// Begin with the network of o.weights. (Lean: rounded to what it computes with; the rests are 0.)
template <class Trainer>
void begin_with_weights(Trainer& t) {
  auto master = t.a.master;
  auto* average = t.a.average;
  size_t n = t.net.table.size;
  load_tensors(SafetensorsReader(t.o.weights), t.o.weights, t.device, t.net.table,
               Stored{"", t.lean ? master.weights : nullptr},
               Stored{"", t.lean ? nullptr : master.own});
  if (t.lean) t.device.fill(master.own, 0, n * sizeof(*master.own));
  if (average)
    for_each(t.device, n / 4, [=] HD(size_t i) { store(average + 4 * i, master.get(4 * i)); });
  t.set_step(0);
  std::printf("begins with %s\n", visible(t.o.weights).c_str());
}

template <class Trainer>
void resume_run(Trainer& t) {
  std::string path = t.o.out + "/state.safetensors";
  SafetensorsReader file(path);
  std::string step = described(file, path, "step");
  with_state(t, [&](auto... slabs) { load_tensors(file, path, t.device, t.net.table, slabs...); });
  t.set_step(step == "0" ? 0 : positive_integer(step, path + ": metadata step"));
}
