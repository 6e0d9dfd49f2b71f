// Events replayed on PyTorch's caching allocator as it is set by default and where nothing ever runs out. allocator.py says
// the same in Python, for every setting, and names the source; a property test holds both side by side.
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((int64_t)1 << 20)
#define ROUND_UP(value, unit) (((value) + (unit)-1) / (unit) * (unit))

// A stretch of memory inside a segment, and those that touch it (none: the segment ends there).
typedef struct Block {
  int64_t address, size;
  struct Block *before, *after;
  bool free;
} Block;

// Free blocks by size, then address. A remainder of up to `slack` bytes stays with its block.
typedef struct {
  Block **blocks;
  int64_t count, room, slack;
} Pool;

// `highest` is the place of the event, counted over all stretches, after which most bytes are live, rounded to blocks of 512.
typedef struct {
  int64_t allocated, allocated_peak, reserved, reserved_peak, inactive_split, requested, segments, mallocs, frees, highest;
} Counters;

typedef struct {
  Pool small, large;
  Counters now;
  Block *spare; // linked by `after`
  void **chunks;
  int64_t chunk_count, next_address;
  int64_t live, most_live, happened;
} Allocator;

enum { FINE, OUT_OF_HOST_MEMORY, NOT_LIVE };
enum { NOTHING, EMPTY_CACHE, RESET_PEAKS };

static Block *new_block(Allocator *all) {
  if (!all->spare) {
    const int count = 4096;
    void **chunks = realloc(all->chunks, (size_t)(all->chunk_count + 1) * sizeof *chunks);
    if (!chunks) return NULL;
    all->chunks = chunks;
    Block *chunk = malloc((size_t)count * sizeof *chunk);
    if (!chunk) return NULL;
    chunks[all->chunk_count++] = chunk;
    for (int i = 0; i < count; i++) chunk[i].after = i + 1 < count ? &chunk[i + 1] : NULL;
    all->spare = chunk;
  }
  Block *block = all->spare;
  all->spare = block->after;
  return block;
}

static void drop_block(Allocator *all, Block *block) {
  block->after = all->spare;
  all->spare = block;
}

// Returns the place of the first free block of at least this size, and among those at this address or above.
static int64_t place(const Pool *pool, int64_t size, int64_t address) {
  int64_t low = 0, high = pool->count;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    const Block *block = pool->blocks[middle];
    if (block->size < size || (block->size == size && block->address < address)) low = middle + 1;
    else high = middle;
  }
  return low;
}

static bool add(Pool *pool, Block *block) {
  if (pool->count == pool->room) {
    int64_t room = pool->room ? 2 * pool->room : 256;
    Block **blocks = realloc(pool->blocks, (size_t)room * sizeof *blocks);
    if (!blocks) return false;
    pool->blocks = blocks, pool->room = room;
  }
  Block **at = pool->blocks + place(pool, block->size, block->address);
  memmove(at + 1, at, (size_t)(pool->blocks + pool->count++ - at) * sizeof *at);
  *at = block;
  block->free = true;
  return true;
}

static Block *take(Pool *pool, int64_t index) {
  Block **at = pool->blocks + index, *block = *at;
  memmove(at, at + 1, (size_t)(pool->blocks + --pool->count - at) * sizeof *at);
  block->free = false;
  return block;
}

static void take_out(Pool *pool, const Block *block) { take(pool, place(pool, block->size, block->address)); }

static Pool *pool_of(Allocator *all, int64_t size) { return size <= MIB ? &all->small : &all->large; }

static void raise_to(int64_t *peak, int64_t value) {
  if (*peak < value) *peak = value;
}

// Takes the rest of a block behind the first `size` bytes away from it, and returns it.
static Block *split(Allocator *all, Block *block, int64_t size) {
  Block *rest = new_block(all);
  if (!rest) return NULL;
  *rest = (Block){block->address + size, block->size - size, block, block->after, false};
  if (rest->after) rest->after->before = rest;
  block->after = rest;
  block->size = size;
  return rest;
}

// Gets a segment from CUDA, above all that there are: no two touch.
static Block *grow(Allocator *all, int64_t size) {
  Block *block = new_block(all);
  if (!block) return NULL;
  int64_t page = 2 * MIB, segment = size <= MIB ? page : size < 10 * MIB ? 20 * MIB : ROUND_UP(size, page);
  *block = (Block){all->next_address, segment, NULL, NULL, false};
  all->next_address += segment + page;
  all->now.reserved += segment;
  all->now.segments++, all->now.mallocs++;
  raise_to(&all->now.reserved_peak, all->now.reserved);
  return block;
}

static Block *allocate(Allocator *all, int64_t requested) {
  int64_t size = ROUND_UP(requested, 512);
  Pool *pool = pool_of(all, size);
  int64_t index = place(pool, size, 0);
  Block *block = index < pool->count ? take(pool, index) : grow(all, size);
  if (!block) return NULL;
  if (block->size - size > pool->slack) {
    Block *rest = split(all, block, size);
    if (!rest || !add(pool, rest)) return NULL;
  }
  all->now.requested += requested;
  all->now.allocated += block->size;
  raise_to(&all->now.allocated_peak, all->now.allocated);
  return block;
}

static void join(Allocator *all, Block *block) {
  Block *after = block->after;
  block->size += after->size;
  block->after = after->after;
  if (block->after) block->after->before = block;
  drop_block(all, after);
}

static bool release(Allocator *all, Block *block, int64_t requested) {
  Pool *pool = pool_of(all, ROUND_UP(requested, 512));
  all->now.requested -= requested;
  all->now.allocated -= block->size;
  if (block->after && block->after->free) {
    take_out(pool, block->after);
    join(all, block);
  }
  if (block->before && block->before->free) {
    block = block->before;
    take_out(pool, block);
    join(all, block);
  }
  return add(pool, block);
}

static bool is_whole(const Block *block) { return !block->before && !block->after; }

static void empty_cache(Allocator *all, Pool *pool) {
  int64_t kept = 0;
  for (int64_t i = 0; i < pool->count; i++) {
    Block *block = pool->blocks[i];
    if (!is_whole(block)) {
      pool->blocks[kept++] = block;
      continue;
    }
    all->now.reserved -= block->size;
    all->now.segments--, all->now.frees++;
    drop_block(all, block);
  }
  pool->count = kept;
}

static int64_t split_bytes(const Pool *pool) {
  int64_t sum = 0;
  for (int64_t i = 0; i < pool->count; i++)
    if (!is_whole(pool->blocks[i])) sum += pool->blocks[i]->size;
  return sum;
}

static void count_live(Allocator *all, int64_t bytes) {
  all->live += bytes;
  if (bytes > 0 && all->live > all->most_live) {
    all->most_live = all->live;
    all->now.highest = all->happened;
  }
}

static int run(Allocator *all, Block **live, const int64_t *sizes, const int64_t *event, const int64_t *end) {
  for (; event < end; event++, all->happened++) {
    int64_t storage = *event < 0 ? ~*event : *event;
    if (!sizes[storage]) continue;
    if (*event >= 0) {
      live[storage] = allocate(all, sizes[storage]);
      if (!live[storage]) return OUT_OF_HOST_MEMORY;
      count_live(all, ROUND_UP(sizes[storage], 512));
    } else {
      if (!live[storage]) return NOT_LIVE;
      if (!release(all, live[storage], sizes[storage])) return OUT_OF_HOST_MEMORY;
      live[storage] = NULL;
      count_live(all, -ROUND_UP(sizes[storage], 512));
    }
  }
  return FINE;
}

// Notes which storages are live once the event at a place has happened.
static void note_live(const int64_t *events, const int64_t (*stretches)[3], int64_t left, int8_t *live) {
  for (; left >= 0; stretches++) {
    for (int64_t i = (*stretches)[1]; i < (*stretches)[2] && left-- >= 0; i++)
      live[events[i] < 0 ? ~events[i] : events[i]] = events[i] >= 0;
  }
}

// Replays stretches of events on an empty allocator. `sizes` are the bytes of `count` storages; event i allocates storage i
// and ~i frees it; a stretch is what to do before, the number of its first event, and that behind its last. `live_then` says
// of each storage whether it is live when most bytes are, and is zero before. Peaks are since they were last reset.
int replay(const int64_t *sizes, int64_t count, const int64_t *events, const int64_t (*stretches)[3], int64_t stretch_count,
           Counters *counters, int8_t *live_then) {
  Allocator all = {.large.slack = MIB, .next_address = 2 * MIB, .now.highest = -1};
  Block **live = calloc((size_t)count + 1, sizeof *live);
  int status = live ? FINE : OUT_OF_HOST_MEMORY;
  for (int64_t i = 0; status == FINE && i < stretch_count; i++) {
    if (stretches[i][0] == EMPTY_CACHE) {
      empty_cache(&all, &all.small);
      empty_cache(&all, &all.large);
    } else if (stretches[i][0] == RESET_PEAKS) {
      all.now.allocated_peak = all.now.allocated;
      all.now.reserved_peak = all.now.reserved;
      all.most_live = 0;
      all.now.highest = -1;
    }
    status = run(&all, live, sizes, events + stretches[i][1], events + stretches[i][2]);
  }
  all.now.inactive_split = split_bytes(&all.small) + split_bytes(&all.large);
  if (status == FINE) note_live(events, stretches, all.now.highest, live_then);
  *counters = all.now;
  for (int64_t i = 0; i < all.chunk_count; i++) free(all.chunks[i]);
  free(all.chunks), free(all.small.blocks), free(all.large.blocks), free(live);
  return status;
}
