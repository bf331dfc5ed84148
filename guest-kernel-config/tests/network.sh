# Networking: each test has a network namespace of its own.

_in_netns() {
	unshare -n sh -euc "$1"
}

no_interface_is_there_unasked() {
	ip -o link
	[ "$(ip -o link | wc -l)" = 2 ]
	[ "$(_in_netns 'ip -o link | wc -l')" = 1 ]
}
every_virtual_device() {
	_in_netns 'ip link add d0 type dummy; ip link set d0 up
		ip link add v0 type veth peer name v1
		ip link add br0 type bridge vlan_filtering 1; ip link set v0 master br0; bridge vlan add dev v0 vid 7
		ip link add link d0 name d0.5 type vlan id 5
		ip link add link d0 name mv0 type macvlan mode bridge
		ip link add link v1 name iv0 type ipvlan mode l3
		ip link add link d0 name mt0 type macvtap
		ip link add vx0 type vxlan id 3 dstport 4789 local 127.0.0.1
		ip link add gn0 type geneve id 3 remote 127.0.0.2
		ip link add wg0 type wireguard; ip link set wg0 up
		ip link add ifb0 type ifb
		ip link add bond0 type bond
		ip link add vrf0 type vrf table 10
		ip link add ipip0 type ipip remote 127.0.0.2
		ip link add gre0x type gre remote 127.0.0.2
		ip link add sit0x type sit remote 127.0.0.2
		ip link add xf0 type xfrm dev lo if_id 1
		ip tuntap add tap0 mode tap multi_queue vnet_hdr
		ip tuntap add tun0 mode tun'
}
qdiscs_classifiers_actions() {
	_in_netns 'ip link add d0 type dummy; ip link add d1 type dummy; ip link set d0 up; ip link set d1 up
		for q in "fq" "fq_codel" "htb default 1" "tbf rate 1mbit burst 32k latency 50ms" "cake bandwidth 1mbit" \
			"netem delay 5ms loss 1%" "sfq" "prio" "hfsc" "drr" "codel" "pie" "red limit 100000 avpkt 1000"; do
			tc qdisc replace dev d0 root $q
			tc qdisc del dev d0 root
		done
		tc qdisc add dev d0 ingress
		tc filter add dev d0 parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev d1
		tc qdisc del dev d0 ingress
		tc qdisc add dev d0 clsact
		tc filter add dev d0 ingress protocol ip flower dst_ip 10.0.0.1 action drop
		tc filter add dev d0 egress matchall action police rate 1mbit burst 10k conform-exceed drop
		tc filter add dev d0 egress protocol ip prio 5 flower ip_proto tcp action skbedit priority 1'
}
wireguard_carries_traffic() {
	ip netns add a
	ip netns add b
	ip link add va netns a type veth peer name vb netns b
	ip -n a addr add 10.9.0.1/24 dev va
	ip -n b addr add 10.9.0.2/24 dev vb
	ip -n a link set va up
	ip -n b link set vb up
	ip netns exec a ip link add wg0 type wireguard
	ip netns del a
	ip netns del b
}
nat_and_conntrack_by_nftables() {
	_in_netns 'nft -f - <<END
table inet t {
	set s { type ipv4_addr; flags interval, timeout; elements = { 10.0.0.0/8 } }
	map m { type ipv4_addr . inet_service : verdict; }
	flowtable f { hook ingress priority 0; devices = { lo }; }
	chain pre { type nat hook prerouting priority dstnat; tcp dport 80 redirect to :8080; tcp dport 81 dnat ip to 10.1.1.1; }
	chain post { type nat hook postrouting priority srcnat; ip saddr 10.0.0.0/8 masquerade random; }
	chain in {
		type filter hook input priority 0; policy accept;
		ct state established,related counter accept
		ip saddr @s limit rate 5/second log prefix "x" drop
		meta cgroup 1 counter
		socket transparent 1 accept
		fib saddr . iif oif missing drop
		numgen random mod 2 0 counter
		ct count over 5 reject with tcp reset
		meta l4proto tcp queue num 1
		quota over 5 mbytes drop
	}
	chain forward { type filter hook forward priority 0; tcp option maxseg size set rt mtu; flow add @f; }
	chain man { type filter hook prerouting priority mangle; meta l4proto tcp tproxy to :1 meta mark set 1; }
	chain early { type filter hook prerouting priority raw; ct zone set 1; notrack; }
}
table netdev n { chain c { type filter hook ingress device lo priority 0; dup to lo; }; }
table bridge b { chain c { type filter hook forward priority 0; ether type ip counter; }; }
table arp a { chain c { type filter hook input priority 0; counter; }; }
END'
}
iptables() {
	for family in iptables ip6tables; do
		for flavour in nft legacy; do
			_in_netns "t=$family-$flavour"'
				$t -A INPUT -m conntrack --ctstate NEW -m comment --comment c -j ACCEPT
				$t -A INPUT -p tcp -m multiport --dports 1,2 -m limit --limit 1/s -j LOG
				$t -A INPUT -p tcp -m tcp --dport 5 -j REJECT --reject-with tcp-reset
				$t -A INPUT -m mark --mark 1 -m connmark --mark 1 -m statistic --mode random --probability 0.5 -j DROP
				$t -A INPUT -m addrtype --dst-type LOCAL -m hashlimit --hashlimit-upto 1/s --hashlimit-name h -j ACCEPT
				$t -A INPUT -m string --algo bm --string x -m recent --set --name r -j ACCEPT
				$t -A OUTPUT -m owner --uid-owner 1337 -m time --timestart 1:00 -j RETURN
				$t -A FORWARD -m physdev --physdev-is-bridged -j ACCEPT
				$t -t nat -A POSTROUTING -j MASQUERADE --random-fully
				$t -t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 15001
				$t -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 1
				$t -t mangle -A PREROUTING -m socket --transparent -j MARK --set-mark 1
				$t -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
				$t -t mangle -A OUTPUT -m cgroup --path / -j CONNMARK --save-mark
				$t -t raw -A PREROUTING -j CT --notrack
				$t -t raw -A PREROUTING -m rpfilter --invert -j DROP'
		done
	done
}
ipset_with_iptables() {
	_in_netns 'ipset create a hash:ip; ipset create b hash:net,port; ipset create c bitmap:port range 0-100
		ipset create d list:set; ipset create e hash:net,iface; ipset add a 10.0.0.1
		iptables-nft -A INPUT -m set --match-set a src -j DROP
		iptables-legacy -A INPUT -m set --match-set a src -j DROP'
}
bridge_netfilter() {
	[ "$(cat /proc/sys/net/bridge/bridge-nf-call-iptables)" = 1 ]
}
routing_tables_and_rules() {
	_in_netns 'ip link set lo up; ip rule add fwmark 1 lookup 100; ip -6 rule add fwmark 1 lookup 100
		ip route add local 0.0.0.0/0 dev lo table 100; ip -6 route add local ::/0 dev lo table 100
		ip route add 10.0.0.0/8 nexthop dev lo weight 1 nexthop dev lo weight 2'
}
congestion_controls() {
	grep -qw bbr /proc/sys/net/ipv4/tcp_available_congestion_control
	grep -qw cubic /proc/sys/net/ipv4/tcp_congestion_control
}
diagnostics_by_ss() {
	ss -tan >/dev/null
	ss -xan >/dev/null
	ss --vsock -an >/dev/null
}
ipsec_state() {
	_in_netns 'ip xfrm state add src 10.0.0.1 dst 10.0.0.2 proto esp spi 1 mode tunnel \
		aead "rfc4106(gcm(aes))" 0x0123456789012345678901234567890123456789 128'
}
