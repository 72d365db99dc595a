package localnet

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// endsSize is the size of the shared memory in bytes.
const endsSize = maxEnds * 2 * 8

// The seals keep a hostile child from taking memory away that the host looks at, which
// would kill the host.
const endsSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// NewEnds makes the memory. The file is to be inherited by the child, and closed then.
func NewEnds() (*Ends, *os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("ptipc-ends", flags|unix.MFD_NOEXEC_SEAL) // some systems insist on it
	if errors.Is(err, unix.EINVAL) {                                      // and those before Linux 6.3 do not know it
		fd, err = unix.MemfdCreate("ptipc-ends", flags)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("localnet: memory to share with a child: %w", err)
	}
	file := os.NewFile(uintptr(fd), "ptipc-ends")
	err = unix.Ftruncate(fd, endsSize)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, endsSeals)
	}
	var e *Ends
	if err == nil {
		e, err = mapEnds(fd)
	}
	if err != nil {
		file.Close()
		return nil, nil, fmt.Errorf("localnet: memory to share with a child: %w", err)
	}
	return e, file, nil
}

// InheritEnds takes the memory that a host has handed on as the descriptor fd, and
// closes fd. A descriptor that is something else is left alone and is an error.
func InheritEnds(fd int) (*Ends, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("localnet: descriptor %d is not the host's memory: %w", fd, err)
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&endsSeals != endsSeals || stat.Size != endsSize {
		return nil, fmt.Errorf("localnet: descriptor %d is not the host's memory: %w", fd, errors.Join(err, unix.EINVAL))
	}
	e, err := mapEnds(fd)
	if err != nil {
		return nil, fmt.Errorf("localnet: the host's memory: %w", err)
	}
	unix.Close(fd)
	return e, nil
}

func mapEnds(fd int) (*Ends, error) {
	memory, err := unix.Mmap(fd, 0, endsSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	e := &Ends{words: unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(memory))), 2*maxEnds)}
	runtime.AddCleanup(e, func(memory []byte) { _ = unix.Munmap(memory) }, memory)
	return e, nil
}

func (e *Ends) load(i uint32) uint64        { return atomic.LoadUint64(&e.words[i]) }
func (e *Ends) store(i uint32, word uint64) { atomic.StoreUint64(&e.words[i], word) }
func (e *Ends) swap(i uint32, old, new uint64) bool {
	return atomic.CompareAndSwapUint64(&e.words[i], old, new)
}
