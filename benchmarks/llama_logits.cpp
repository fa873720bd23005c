// Lets llama.cpp read token ids from the command line, and writes what it says after them.
//
//   llama_logits MODEL THREADS first ID...       the likeliest next token, on stdout
//   llama_logits MODEL THREADS logits FILE ID... the logits after each token, float32, into FILE
//   llama_logits MODEL THREADS greedy N ID...    N likeliest tokens, one after the other, on stdout
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "llama.h"

static int likeliest(const float *logits, int size) {
  return int(std::max_element(logits, logits + size) - logits);
}

int main(int argc, char **argv) {
  if (argc < 5) return 2;
  const bool all = !strcmp(argv[3], "logits"), greedy = !strcmp(argv[3], "greedy");
  const int first_id = all || greedy ? 5 : 4;
  std::vector<llama_token> ids;
  for (int i = first_id; i < argc; i++) ids.push_back(atoi(argv[i]));
  const int count = greedy ? atoi(argv[4]) : 1;

  llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
  llama_backend_init();
  llama_model_params model_params = llama_model_default_params();
  llama_model *model = llama_model_load_from_file(argv[1], model_params);
  if (!model) return fprintf(stderr, "error: llama.cpp does not load %s\n", argv[1]), 1;
  llama_context_params params = llama_context_default_params();
  params.n_ctx = unsigned(ids.size()) + unsigned(count) + 8;
  params.n_batch = params.n_ubatch = unsigned(ids.size());
  params.n_threads = params.n_threads_batch = atoi(argv[2]);
  llama_context *context = llama_init_from_model(model, params);
  if (!context) return fprintf(stderr, "error: llama.cpp makes no context\n"), 1;
  const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

  llama_batch batch = llama_batch_init(int(ids.size()), 0, 1);
  batch.n_tokens = int(ids.size());
  for (int i = 0; i < batch.n_tokens; i++) {
    batch.token[i] = ids[i];
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = all || i + 1 == batch.n_tokens;
  }
  if (llama_decode(context, batch)) return fprintf(stderr, "error: llama_decode fails\n"), 1;
  if (all) {
    FILE *out = fopen(argv[4], "wb");
    if (!out) return fprintf(stderr, "error: cannot write %s\n", argv[4]), 1;
    for (int i = 0; i < batch.n_tokens; i++)
      fwrite(llama_get_logits_ith(context, i), sizeof(float), size_t(vocab), out);
    return fclose(out) != 0;
  }
  llama_token token = likeliest(llama_get_logits_ith(context, batch.n_tokens - 1), vocab);
  printf("%d\n", token);
  fflush(stdout);
  for (int i = 1; i < count; i++) {
    if (llama_decode(context, llama_batch_get_one(&token, 1))) return 1;
    token = likeliest(llama_get_logits_ith(context, 0), vocab);
    printf("%d\n", token);
  }
  return 0;
}
