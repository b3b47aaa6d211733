/* A tool that NVTX attaches (NVTX_INJECTION64_PATH): prints domains, pushes and pops, as nsys would record them.
   The numbers are those of nvtx3/nvtxDetail/nvtxTypes.h, an ABI that NVTX promises to keep. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { CALLBACKS = 1, CORE2 = 5, PUSH = 4, POP = 5, REGISTER = 10, CREATE = 12 };

typedef struct {
    size_t size;
    int (*table_of)(int module, void ***table, unsigned *entries);
} Callbacks;

typedef struct {  /* of nvtxEventAttributes_t, up to the message */
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const char *message;  /* a registered string is the handle that we gave for it: its own text */
} Attributes;

static void *create(const char *name) {
    printf("domain %s\n", name);
    return (void *)1;
}

static const void *register_string(void *domain, const char *text) {
    size_t length = 0;
    (void)domain;
    while (text[length++]) {}
    char *kept = (char *)__builtin_malloc(length);
    __builtin_memcpy(kept, text, length);
    return kept;
}

static int push(void *domain, const Attributes *attributes) {
    (void)domain;
    printf("push %s\n", attributes->message);
    fflush(stdout);
    return 0;
}

static int pop(void *domain) {
    (void)domain;
    printf("pop\n");
    fflush(stdout);
    return 0;
}

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    const Callbacks *callbacks = (const Callbacks *)export_table(CALLBACKS);
    void **table;
    unsigned entries;
    if (!callbacks || !callbacks->table_of(CORE2, &table, &entries) || entries <= CREATE) return 0;
    *(void **)table[PUSH] = (void *)push;
    *(void **)table[POP] = (void *)pop;
    *(void **)table[REGISTER] = (void *)register_string;
    *(void **)table[CREATE] = (void *)create;
    return 1;
}
