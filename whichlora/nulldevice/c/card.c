// The card, as the environment describes it. whichlora.nulldevice.environment() sets every one of these variables.
#include "null.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int bool_read = 1;
static Card card;

static const char *setting(const char *name) {
  const char *text = getenv(name);
  if (text && *text) return text;
  fprintf(stderr, "null device: %s is not set; start this process with whichlora.nulldevice.environment()\n", name);
  exit(70);
}

static size_t number(const char *name) { return (size_t)strtoull(setting(name), NULL, 10); }

// A card runs code built for its own major version and the same or an older minor one, or compiles PTX of any older version.
static int newest_code(int major, int minor) {
  static const int built[] = {NULLCUDA_CODES}, ptx[] = {NULLCUDA_PTX};
  int capability = 10 * major + minor, best = 0;
  for (size_t i = 0; i < sizeof built / sizeof *built; i++)
    if (built[i] / 10 == major && built[i] <= capability && built[i] > best) best = built[i];
  for (size_t i = 0; i < sizeof ptx / sizeof *ptx; i++)
    if (ptx[i] <= capability && ptx[i] > best) best = ptx[i];
  return best;
}

static void read_card(void) {
  snprintf(card.name, sizeof card.name, "%s", setting("NULLCUDA_NAME"));
  card.total_bytes = number("NULLCUDA_TOTAL_BYTES");
  card.context_bytes = number("NULLCUDA_CONTEXT_BYTES");
  if (sscanf(setting("NULLCUDA_COMPUTE_CAPABILITY"), "%d.%d", &card.major, &card.minor) != 2) exit(70);
  card.sm_count = (int)number("NULLCUDA_SM_COUNT");
  card.l2_bytes = (int)number("NULLCUDA_L2_BYTES");
  card.block_shared_bytes = (int)number("NULLCUDA_BLOCK_SHARED_BYTES");
  card.sm_shared_bytes = (int)number("NULLCUDA_SM_SHARED_BYTES");
  card.sm_threads = (int)number("NULLCUDA_SM_THREADS");
  card.sm_blocks = (int)number("NULLCUDA_SM_BLOCKS");
  card.code = newest_code(card.major, card.minor);
  bool_read = atoi(setting("NULLCUDA_BOOL")) != 0;
}

const Card *the_card(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, read_card);
  return &card;
}

void nullcuda_set_bool(int value) {
  the_card(); // so that reading the environment later does not undo this
  bool_read = value != 0;
}

// Which of the machine's cards this one passes for: the first that CUDA_VISIBLE_DEVICES names, -1 if it names none.
int first_visible(void) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  if (!visible) return 0;
  char *end;
  long index = strtol(visible, &end, 10);
  if (end == visible) return *visible ? 0 : -1; // an identifier, not a number; or nothing
  return index < 0 ? -1 : (int)index;
}
