/* malloc and its kin that fail now and then: preloaded into an engine process to see what it does when memory is short.
   Every `every`-th allocation of at least LEAST bytes returns NULL, once armed by fail_every(). */
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#define LEAST 192

static atomic_long every, seen;
static int note = -1; /* gets a byte for each failure, so that whoever outlives this process can count them */

void fail_every(long n, const char *path) {
    note = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    atomic_store(&every, n);
}

static int fails(size_t size) {
    long n = atomic_load_explicit(&every, memory_order_relaxed);
    if (n == 0 || size < LEAST) return 0;
    if ((atomic_fetch_add(&seen, 1) + 1) % n != 0) return 0;
    if (write(note, "x", 1) < 0) abort();
    errno = ENOMEM;
    return 1;
}

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

void *malloc(size_t size) { return fails(size) ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return fails(count * size) ? NULL : __libc_calloc(count, size); }
void *realloc(void *old, size_t size) { return fails(size) ? NULL : __libc_realloc(old, size); }
void *aligned_alloc(size_t to, size_t size) { return fails(size) ? NULL : __libc_memalign(to, size); }
int posix_memalign(void **found, size_t to, size_t size) {
    if (fails(size)) return ENOMEM;
    void *made = __libc_memalign(to, size);
    if (made == NULL) return ENOMEM;
    *found = made;
    return 0;
}
