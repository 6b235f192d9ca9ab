package cluster

import (
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/hashicorp/serf/serf"
)

// serverList is the servers of a pool in the order that they are asked.
type serverList struct {
	changed wakeup // woken by every update and sync

	mu      sync.Mutex
	servers []server // guarded by mu
}

// update takes in what an event says.
func (l *serverList) update(e serf.MemberEvent) {
	defer l.changed.wake()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range e.Members {
		switch e.Type {
		case serf.EventMemberJoin, serf.EventMemberUpdate:
			m.Status = serf.StatusAlive
		case serf.EventMemberFailed:
			m.Status = serf.StatusFailed
		case serf.EventMemberLeave:
			m.Status = serf.StatusLeft
		case serf.EventMemberReap:
			m.Status = serf.StatusNone
		}
		l.setLocked(m)
	}
}

func (l *serverList) setLocked(m serf.Member) {
	at := slices.IndexFunc(l.servers, func(s server) bool { return s.member == m.Name })
	s, ok := parseServer(m)
	switch {
	case !ok || m.Status == serf.StatusNone || m.Status == serf.StatusLeft:
		if at >= 0 {
			l.servers = slices.Delete(l.servers, at, at+1)
		}
	case at >= 0:
		l.servers[at] = s
	default:
		// Anywhere, so that agents which learn of servers in the same order do not
		// all ask the same one.
		l.servers = slices.Insert(l.servers, rand.IntN(len(l.servers)+1), s)
	}
}

// sync makes the list agree with the members, in case an event was lost.
func (l *serverList) sync(members []serf.Member) {
	defer l.changed.wake()
	l.mu.Lock()
	defer l.mu.Unlock()
	known := map[string]bool{}
	for _, m := range members {
		known[m.Name] = true
		l.setLocked(m)
	}
	l.servers = slices.DeleteFunc(l.servers, func(s server) bool { return !known[s.member] })
}

// demote has the server asked last from now on.
func (l *serverList) demote(address string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := slices.IndexFunc(l.servers, func(s server) bool { return s.address == address })
	if at < 0 {
		return
	}
	s := l.servers[at]
	l.servers = append(slices.Delete(l.servers, at, at+1), s)
}

// shuffle chooses a new order, which spreads agents over servers that came later.
func (l *serverList) shuffle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	shuffle(l.servers)
}

func shuffle(s []server) { rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] }) }

// all returns those that are alive or failed.
func (l *serverList) all() []server {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.servers)
}

// healthy returns those of the datacenter that are alive, in order; known says
// whether there is any, alive or not.
func (l *serverList) healthy(dc string) (alive []server, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.servers {
		if s.dc != dc {
			continue
		}
		known = true
		if s.status == serf.StatusAlive {
			alive = append(alive, s)
		}
	}
	return alive, known
}

// at returns the server with that RPC address.
func (l *serverList) at(address string) (server, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.servers {
		if s.address == address {
			return s, true
		}
	}
	return server{}, false
}

// byID returns the server with that node ID.
func (l *serverList) byID(id string) (server, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.servers {
		if s.id == id && s.status == serf.StatusAlive {
			return s, true
		}
	}
	return server{}, false
}

// bell wakes one waiter; a ring while nobody waits is kept.
type bell chan struct{}

func newBell() bell { return make(bell, 1) }

func (b bell) ring() {
	select {
	case b <- struct{}{}:
	default:
	}
}
