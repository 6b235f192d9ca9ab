// The floor: a forwarder that does nothing but forward. It makes the system calls that
// cannot be done without and keeps no timer, limit, count or name; where a send is not
// taken whole, bytes are lost. What a real one costs more is its own.
//
// usage: floor PORT THREADS BACKEND-PORT
// Connections to 127.0.0.1:PORT go to 127.1.0.1 to 127.1.0.16 in turns.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FILES = 1 << 16, EVENTS = 256, BATCH = 16, BACKENDS = 16, NONE = -1, PENDING = -2 };

static int port, backend;
static int peer[FILES];    // of each socket
static char ended[FILES];  // what it sends

static struct sockaddr_in address(unsigned host, int p) {
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(p)};
	a.sin_addr.s_addr = htonl(host);
	return a;
}

static void watch(int ep, int fd, unsigned events) {
	struct epoll_event e = {.events = events, .data.fd = fd};
	if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e) != 0) {
		perror("epoll_ctl");
		exit(1);
	}
}

// begin forwards a connection once its first bytes are here.
static void begin(int ep, int fd, unsigned turn, char *buf, size_t size) {
	ssize_t n = recv(fd, buf, size, 0);
	if (n < 0 && errno == EAGAIN) {
		if (peer[fd] != PENDING)
			watch(ep, fd, EPOLLIN | EPOLLRDHUP | EPOLLET);
		peer[fd] = PENDING;
		return;
	}
	int to = n > 0 ? socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0) : -1;
	if (to < 0 || to >= FILES) {
		peer[fd] = NONE;
		close(fd);
		return;
	}
	struct sockaddr_in a = address(0x7f010001 + turn % BACKENDS, backend);
	connect(to, (struct sockaddr *)&a, sizeof a);  // on loopback it is connected now
	send(to, buf, n, MSG_NOSIGNAL);
	watch(ep, to, EPOLLIN | EPOLLRDHUP | EPOLLET);
	if (peer[fd] != PENDING)
		watch(ep, fd, EPOLLIN | EPOLLRDHUP | EPOLLET);
	peer[fd] = to, peer[to] = fd;
	ended[fd] = ended[to] = 0;
}

static void *loop(void *unused) {
	static __thread char buf[1 << 16];
	struct epoll_event ev[EVENTS];
	int done[2 * EVENTS];  // to be closed after the turn: their events may be in it
	int one = 1, l = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), ep = epoll_create1(0);
	struct sockaddr_in a = address(INADDR_LOOPBACK, port);
	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	setsockopt(l, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
	setsockopt(l, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (bind(l, (struct sockaddr *)&a, sizeof a) != 0 || listen(l, 65535) != 0) {
		perror("listen");
		exit(1);
	}
	watch(ep, l, EPOLLIN);
	for (unsigned turn = 0;;) {
		int over = 0, n = epoll_wait(ep, ev, EVENTS, -1);
		for (int i = 0; i < n; i++) {
			int fd = ev[i].data.fd;
			if (fd == l) {
				for (int k = 0; k < BATCH; k++) {
					socklen_t size = sizeof a;
					int c = accept4(l, (struct sockaddr *)&a, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
					if (c < 0)
						break;
					begin(ep, c, turn++, buf, sizeof buf);
				}
				continue;
			}
			int to = peer[fd];
			if (to == PENDING)
				begin(ep, fd, turn++, buf, sizeof buf);
			if (to < 0)
				continue;
			for (;;) {
				ssize_t k = recv(fd, buf, sizeof buf, 0);
				if (k > 0) {
					send(to, buf, k, MSG_NOSIGNAL);
					if (k == sizeof buf || ev[i].events & EPOLLRDHUP)
						continue;
				} else if (k < 0 && errno == EAGAIN) {
				} else if (k == 0 && !ended[to]) {
					ended[fd] = 1;
					shutdown(to, SHUT_WR);
				} else {
					peer[fd] = peer[to] = NONE;
					done[over++] = fd, done[over++] = to;
				}
				break;
			}
		}
		while (over > 0)
			close(done[--over]);
	}
	return unused;
}

int main(int argc, char **argv) {
	if (argc != 4) {
		fprintf(stderr, "usage: floor PORT THREADS BACKEND-PORT\n");
		return 2;
	}
	port = atoi(argv[1]);
	backend = atoi(argv[3]);
	memset(peer, NONE, sizeof peer);
	for (int i = atoi(argv[2]); i > 1; i--) {
		pthread_t t;
		if (pthread_create(&t, NULL, loop, NULL) != 0)
			return 1;
	}
	loop(NULL);
}
