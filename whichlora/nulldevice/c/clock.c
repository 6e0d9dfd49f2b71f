// Time on a card that computes nothing: how many kernels, copies and fills were launched and, where somebody tells how long each of them would
// take, the two lanes of a program on a card. The host issues work, the card executes it in order.
#include "null.h"

static unsigned long long launches;
void count_launch(void) { __sync_add_and_fetch(&launches, 1); }
unsigned long long nullcuda_launches(void) { return launches; }

static pthread_mutex_t lanes_lock = PTHREAD_MUTEX_INITIALIZER;
static int told;                 // somebody tells: events then show the card's time, not the host's real one
static double began_s;           // when somebody first did, by the clock that events showed before
static double issued_s, ended_s; // when the host has issued, and the card executed, all work so far

// The host spends host_s on issuing work that takes the card device_s.
void nullcuda_work(double host_s, double device_s) {
  pthread_mutex_lock(&lanes_lock);
  if (!told) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    began_s = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    told = 1;
  }
  issued_s += host_s;
  if (device_s > 0) ended_s = (issued_s > ended_s ? issued_s : ended_s) + device_s;
  pthread_mutex_unlock(&lanes_lock);
}

static double wait_s;       // what it takes the host to hear that the card is done
static double level_s = -1; // when it last heard so

void nullcuda_wait_takes(double seconds) { wait_s = seconds; }

// The host waits until the card has executed everything; it knows already where nothing was issued since, as behind a copy to the host.
void wait_for_card(void) {
  pthread_mutex_lock(&lanes_lock);
  int news = issued_s > level_s || ended_s > level_s;
  if (issued_s < ended_s) issued_s = ended_s;
  if (told && news) issued_s += wait_s;
  if (told) level_s = issued_s;
  pthread_mutex_unlock(&lanes_lock);
}

double nullcuda_host_s(void) {
  pthread_mutex_lock(&lanes_lock);
  double now_s = issued_s;
  pthread_mutex_unlock(&lanes_lock);
  return now_s;
}

// When the card reaches what the host issues now.
double nullcuda_device_s(void) {
  pthread_mutex_lock(&lanes_lock);
  double now_s = issued_s > ended_s ? issued_s : ended_s;
  pthread_mutex_unlock(&lanes_lock);
  return now_s;
}

int card_time(struct timespec *now) {
  if (!told) return 0;
  double now_s = began_s + nullcuda_device_s();
  now->tv_sec = (time_t)now_s;
  now->tv_nsec = (long)((now_s - (double)now->tv_sec) * 1e9);
  return 1;
}
