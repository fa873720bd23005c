// Asks llama.cpp: token ids of texts, logits of ids, a greedy continuation, or what becomes of
// values that are stored in one of its types (ggml's number for it).
//
// usage: llama_cpp_probe MODEL.gguf tokenize PARSE_SPECIAL < texts > ids
//        llama_cpp_probe MODEL.gguf logits               < ids   > float32 values
//        llama_cpp_probe MODEL.gguf greedy COUNT         < ids   > ids
//        llama_cpp_probe TYPE blocks COLUMNS             < values > blocks, values
//
// Both streams are records: a 32-bit length in elements (bytes, ids or values), then the elements,
// little-endian. Every sequence starts afresh. Keys and values are float32 and one thread
// computes, so that nothing is rounded but what the weights' type rounds; the weights are not
// repacked for the processor at hand, so that another machine gives the same answer.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "llama.h"

namespace {

[[noreturn]] void fail(const char *what) {
  std::fprintf(stderr, "llama_cpp_probe: %s\n", what);
  std::exit(1);
}

template <typename T>
bool read_record(std::vector<T> &record) {
  uint32_t length;
  if (std::fread(&length, sizeof length, 1, stdin) != 1) return false;
  record.resize(length);
  if (std::fread(record.data(), sizeof(T), length, stdin) != length) fail("a record is cut short");
  return true;
}

template <typename T>
void write_record(const T *data, size_t length) {
  const uint32_t count = static_cast<uint32_t>(length);
  std::fwrite(&count, sizeof count, 1, stdout);
  std::fwrite(data, sizeof(T), length, stdout);
}

void tokenize(const llama_vocab *vocab, bool parse_special) {
  std::vector<char> text;
  while (read_record(text)) {
    std::vector<llama_token> ids(text.size() + 16);
    const int32_t count =
        llama_tokenize(vocab, text.data(), static_cast<int32_t>(text.size()), ids.data(),
                       static_cast<int32_t>(ids.size()), false, parse_special);
    if (count < 0) fail("more tokens than bytes");
    write_record(ids.data(), static_cast<size_t>(count));
  }
}

// Reads `ids` on from `first`; afterwards the logits of all of them, or of the last, can be had.
void decode(llama_context *context, const std::vector<llama_token> &ids, size_t first, bool all) {
  llama_batch batch = llama_batch_init(static_cast<int32_t>(ids.size()), 0, 1);
  for (size_t i = 0; i < ids.size(); ++i) {
    batch.token[i] = ids[i];
    batch.pos[i] = static_cast<llama_pos>(first + i);
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = all || i + 1 == ids.size();
  }
  batch.n_tokens = static_cast<int32_t>(ids.size());
  if (llama_decode(context, batch) != 0) fail("llama_decode failed");
  llama_batch_free(batch);
}

void logits(llama_context *context, size_t vocab_size) {
  std::vector<llama_token> ids;
  while (read_record(ids)) {
    llama_memory_clear(llama_get_memory(context), true);
    decode(context, ids, 0, true);
    std::vector<float> values(ids.size() * vocab_size);
    for (size_t i = 0; i < ids.size(); ++i)
      std::memcpy(&values[i * vocab_size], llama_get_logits_ith(context, static_cast<int32_t>(i)),
                  vocab_size * sizeof(float));
    write_record(values.data(), values.size());
  }
}

void greedy(llama_context *context, size_t vocab_size, size_t count) {
  std::vector<llama_token> ids;
  while (read_record(ids)) {
    llama_memory_clear(llama_get_memory(context), true);
    std::vector<llama_token> found, next = ids;
    size_t done = 0;
    while (found.size() < count) {
      decode(context, next, done, false);
      done += next.size();
      const float *row = llama_get_logits_ith(context, -1);
      size_t best = 0;
      for (size_t i = 1; i < vocab_size; ++i)
        if (row[i] > row[best]) best = i;
      next.assign(1, static_cast<llama_token>(best));
      found.push_back(next[0]);
    }
    write_record(found.data(), found.size());
  }
}

void blocks(ggml_type type, int64_t columns) {
  std::vector<float> values;
  while (read_record(values)) {
    const int64_t rows = static_cast<int64_t>(values.size()) / columns;
    std::vector<uint8_t> packed(static_cast<size_t>(rows) * ggml_row_size(type, columns));
    const std::vector<float> importance(static_cast<size_t>(columns), 1.0f);
    ggml_quantize_chunk(type, values.data(), packed.data(), 0, rows, columns, importance.data());
    ggml_get_type_traits(type)->to_float(packed.data(), values.data(),
                                         static_cast<int64_t>(values.size()));
    write_record(packed.data(), packed.size());
    write_record(values.data(), values.size());
  }
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 3) fail("usage: llama_cpp_probe MODEL.gguf tokenize|logits|greedy|blocks [NUMBER]");
  const std::string task = argv[2];
  const int number = argc > 3 ? std::atoi(argv[3]) : 0;
  if (task == "blocks") {
    blocks(static_cast<ggml_type>(std::atoi(argv[1])), number);
    return 0;
  }
  llama_log_set(
      [](ggml_log_level level, const char *text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  llama_model_params model_options = llama_model_default_params();
  model_options.vocab_only = task == "tokenize";
  model_options.use_extra_bufts = false;
  llama_model *model = llama_model_load_from_file(argv[1], model_options);
  if (model == nullptr) fail("the model does not load");
  const llama_vocab *vocab = llama_model_get_vocab(model);
  if (task == "tokenize") {
    tokenize(vocab, number != 0);
    return 0;
  }
  llama_context_params options = llama_context_default_params();
  options.n_ctx = 4096;
  options.n_batch = 4096;
  options.n_ubatch = 4096;
  options.n_threads = options.n_threads_batch = 1;
  options.type_k = options.type_v = GGML_TYPE_F32;
  options.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  llama_context *context = llama_init_from_model(model, options);
  if (context == nullptr) fail("there is no room for a context");
  const size_t vocab_size = static_cast<size_t>(llama_vocab_n_tokens(vocab));
  if (task == "logits")
    logits(context, vocab_size);
  else if (task == "greedy")
    greedy(context, vocab_size, static_cast<size_t>(number));
  else
    fail("expected tokenize, logits or greedy");
  return 0;
}
