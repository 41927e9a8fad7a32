// A stand-in for NVIDIA's management library, for tests on machines without a GPU. It has the functions that are called,
// with the types of nvml.h, and answers what the file MACHINE says, which it reads at every call. A line is a GPU:
//
//   <uuid> <utilisation> <code> <memory used> <memory in all> <code>
//
// The codes are what the call for the utilisation and the one for the memory return: 0 is success, 3 not supported, 15
// that the GPU is lost; -1 makes the call never return, and says so by a file MACHINE.hangs. Without a file no driver is
// loaded.

#include <cstdio>
#include <cstring>
#include <unistd.h>

namespace {

constexpr int SUCCESS = 0;
constexpr int INVALID_ARGUMENT = 2;
constexpr int NOT_FOUND = 6;
constexpr int INSUFFICIENT_SIZE = 7;
constexpr int DRIVER_NOT_LOADED = 9;
constexpr int VERSION_MISMATCH = 25;

constexpr unsigned GPUS_MAX = 8;

struct Gpu {
    char uuid[96];
    unsigned utilization;
    int utilization_code;
    unsigned long long used_bytes;
    unsigned long long total_bytes;
    int memory_code;
};

struct Machine {
    bool has_driver;
    unsigned count;
    Gpu gpus[GPUS_MAX];
};

Machine look() {
    Machine machine = {};
    std::FILE *file = std::fopen(MACHINE, "r");
    if (file == nullptr) {
        return machine;
    }
    machine.has_driver = true;
    while (machine.count < GPUS_MAX) {
        Gpu &gpu = machine.gpus[machine.count];
        const int read =
            std::fscanf(file, "%95s %u %d %llu %llu %d", gpu.uuid, &gpu.utilization,
                        &gpu.utilization_code, &gpu.used_bytes, &gpu.total_bytes, &gpu.memory_code);
        if (read != 6) {
            break;
        }
        ++machine.count;
    }
    std::fclose(file);
    return machine;
}

int answer(int code) {
    if (code >= 0) {
        return code;
    }
    if (std::FILE *file = std::fopen(MACHINE ".hangs", "w")) {
        std::fclose(file);
    }
    for (;;) {
        pause();
    }
}

int copy(const char *text, char *target, unsigned length) {
    if (std::strlen(text) >= length) {
        return INSUFFICIENT_SIZE;
    }
    std::strcpy(target, text);
    return SUCCESS;
}

// A handle is the number of a line, from 1 on.
bool find(const Machine &machine, void *device, Gpu &gpu) {
    const auto number = reinterpret_cast<unsigned long>(device);
    if (number < 1 || number > machine.count) {
        return false;
    }
    gpu = machine.gpus[number - 1];
    return true;
}

} // namespace

extern "C" {

// nvmlUtilization_t
struct Utilization {
    unsigned gpu;
    unsigned memory;
};

// nvmlMemory_v2_t
struct Memory {
    unsigned version;
    unsigned long long total;
    unsigned long long reserved;
    unsigned long long free;
    unsigned long long used;
};

int nvmlInit_v2() { return look().has_driver ? SUCCESS : DRIVER_NOT_LOADED; }

int nvmlShutdown() { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = look().count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= look().count) {
        return INVALID_ARGUMENT;
    }
    *device = reinterpret_cast<void *>(static_cast<unsigned long>(index) + 1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    const Machine machine = look();
    for (unsigned index = 0; index < machine.count; ++index) {
        if (std::strcmp(machine.gpus[index].uuid, uuid) == 0) {
            return nvmlDeviceGetHandleByIndex_v2(index, device);
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    Gpu gpu;
    return find(look(), device, gpu) ? copy(gpu.uuid, uuid, length) : INVALID_ARGUMENT;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    Gpu gpu;
    return find(look(), device, gpu) ? copy("Stand-in", name, length) : INVALID_ARGUMENT;
}

int nvmlDeviceGetUtilizationRates(void *device, Utilization *rates) {
    Gpu gpu;
    if (!find(look(), device, gpu)) {
        return INVALID_ARGUMENT;
    }
    *rates = {gpu.utilization, 0};
    return answer(gpu.utilization_code);
}

int nvmlDeviceGetMemoryInfo_v2(void *device, Memory *memory) {
    Gpu gpu;
    if (!find(look(), device, gpu)) {
        return INVALID_ARGUMENT;
    }
    if (memory->version != (sizeof(Memory) | 2U << 24)) {
        return VERSION_MISMATCH;
    }
    memory->total = gpu.total_bytes;
    memory->used = gpu.used_bytes;
    return answer(gpu.memory_code);
}

} // extern "C"
